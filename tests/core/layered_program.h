// SPDX-License-Identifier: Apache-2.0
// A step of equal layers, three regions each, between an embedding and a loss:
// what recomputation and offload find in a transformer.
//
//   f.<i>.0 (h.<i>, w.<i>) -> (q.<i>)              the saved of a layer: h, q, c
//   f.<i>.1 (q.<i>) -> (c.<i>)
//   f.<i>.2 (c.<i>, h.<i>, v.<i>) -> (h.<i+1>)
#pragma once

#include <cstdint>
#include <string>

namespace deepcompile {

struct LayeredOptions {
  int layers = 3;
  int64_t unit = 1024;  // bytes of h; q is four times as much, c twice
  int64_t numel = 256;  // of each parameter, f32
  std::string placement = "";
  std::string marked = "";  // appended to the forward regions of all layers
  std::string header = "";
};

inline std::string layered_program(const LayeredOptions& options = {}) {
  const auto bytes = [&](int64_t units) { return std::to_string(units * options.unit) + "B"; };
  const std::string numel = std::to_string(options.numel);
  const std::string placed = options.placement.empty() ? "" : " " + options.placement;
  const std::string whole = std::to_string(options.numel * 4) + "B";
  std::string params = "param e f32 " + numel + placed + "\n";
  std::string values = "value ids 64B\nvalue h.0 " + bytes(1) + "\nvalue loss 4B\nvalue p " +
                       bytes(1) + "\nvalue t 4B\nvalue g.e " + whole + " grad=e\n";
  std::string regions = "region emb code=1 time=10ns (ids, e) -> (h.0)\n", backward_regions;
  std::string forward = "  run emb\n", backward;
  const std::string mark = options.marked.empty() ? "" : " " + options.marked;
  for (int i = 0; i < options.layers; ++i) {
    const std::string n = std::to_string(i), next = std::to_string(i + 1);
    params += "param w." + n + " f32 " + numel + placed + "\nparam v." + n + " f32 " + numel +
              placed + "\n";
    values += "value q." + n + " " + bytes(4) + "\nvalue c." + n + " " + bytes(2) + "\nvalue h." +
              next + " " + bytes(1) + "\nvalue d." + next + " " + bytes(1) + "\nvalue x." + n +
              " " + bytes(2) + "\nvalue y." + n + " " + bytes(4) + "\nvalue g.w." + n + " " +
              whole + " grad=w." + n + "\nvalue g.v." + n + " " + whole + " grad=v." + n + "\n";
    regions += "region f." + n + ".0 code=2 time=30ns" + mark + " (h." + n + ", w." + n +
               ") -> (q." + n + ")\nregion f." + n + ".1 code=3 time=5ns" + mark + " (q." + n +
               ") -> (c." + n + ")\nregion f." + n + ".2 code=4 time=20ns" + mark + " (c." + n +
               ", h." + n + ", v." + n + ") -> (h." + next + ")\n";
    forward += "  run f." + n + ".0\n  run f." + n + ".1\n  run f." + n + ".2\n";
    backward_regions += "region b." + n + ".2 code=5 time=40ns (d." + next + ", c." + n + ", v." +
                        n + ") -> (x." + n + ", g.v." + n + ")\nregion b." + n +
                        ".1 code=6 time=10ns (x." + n + ", q." + n + ") -> (y." + n +
                        ")\nregion b." + n + ".0 code=7 time=60ns (y." + n + ", h." + n + ", w." +
                        n + ") -> (d." + n + ", g.w." + n + ")\n";
    backward = "  run b." + n + ".2\n  run b." + n + ".1\n  run b." + n + ".0\n" + backward;
  }
  const std::string last = std::to_string(options.layers);
  values += "value d.0 " + bytes(1) + "\n";
  regions += "region head code=8 time=10ns (h." + last + ") -> (p, loss)\n" + backward_regions +
             "region b.head code=9 time=10ns (t, p) -> (d." + last +
             ")\nregion b.emb code=10 time=10ns (d.0, ids) -> (g.e)\n";
  return "step layered world=2" + (options.header.empty() ? "" : " " + options.header) + "\n" +
         params + values + regions + "forward 0 (ids) -> (loss)\n" + forward +
         "  run head\nend\nbackward 0 (t) -> ()\n  run b.head\n" + backward +
         "  run b.emb\nend\nupdate\nend\n";
}

}  // namespace deepcompile
