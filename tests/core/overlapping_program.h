// SPDX-License-Identifier: Apache-2.0
// A step of layers whose backward reads more than its own forward's region
// made: what a capture that cuts between attention and the rest comes to. A
// region that runs again does so for the earlier of its two readers, when the
// later layer's activations are still there.
//
//   f.<i> (h.<i>, a.<i>, w.<i>) -> (h.<i+1>, a.<i+1>, s.<i>.0, s.<i>.1)
//   b.<i> (d.<i+1>, s.<i>.0, s.<i>.1, a.<i>, w.<i>) -> (d.<i>, g.<i>)
#pragma once

#include <cstdint>
#include <string>

namespace deepcompile {

struct OverlappingOptions {
  int layers = 8;
  int64_t unit = 4096;   // bytes of h, a and d; s is six times as much
  int64_t numel = 1024;  // of each parameter, f32
};

inline std::string overlapping_program(const OverlappingOptions& options = {}) {
  const std::string unit = std::to_string(options.unit) + "B";
  const std::string saved = std::to_string(options.unit * 6) + "B";
  const std::string numel = std::to_string(options.numel);
  const std::string whole = std::to_string(options.numel * 4) + "B";
  std::string params, values = "value h.0 " + unit + "\nvalue a.0 " + unit + "\nvalue t 4B\n";
  std::string regions, forward, backward;
  for (int i = 0; i < options.layers; ++i) {
    const std::string n = std::to_string(i), next = std::to_string(i + 1);
    params += "param w." + n + " f32 " + numel + "\n";
    values += "value h." + next + " " + unit + "\nvalue a." + next + " " + unit + "\nvalue s." + n +
              ".0 " + saved + "\nvalue s." + n + ".1 " + saved + "\nvalue d." + n + " " + unit +
              "\nvalue g." + n + " " + whole + " grad=w." + n + "\n";
    regions += "region f." + n + " code=1 workspace=" + unit + " time=4000ns (h." + n + ", a." + n +
               ", w." + n + ") -> (h." + next + ", a." + next + ", s." + n + ".0, s." + n +
               ".1)\nregion b." + n + " code=2 workspace=" + unit + " time=9000ns (" +
               (i + 1 == options.layers ? "t" : "d." + next) + ", s." + n + ".0, s." + n +
               ".1, a." + n + ", w." + n + ") -> (d." + n + ", g." + n + ")\n";
    forward += "  run f." + n + "\n";
    backward = "  run b." + n + "\n" + backward;
  }
  const std::string last = std::to_string(options.layers);
  return "step overlapping world=2\n" + params + values + regions + "forward 0 (h.0, a.0) -> (h." +
         last + ")\n" + forward + "end\nbackward 0 (t) -> ()\n" + backward + "end\nupdate\nend\n";
}

}  // namespace deepcompile
