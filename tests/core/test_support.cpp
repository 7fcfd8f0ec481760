// SPDX-License-Identifier: Apache-2.0
// Definitions of test_support.h.
#include "test_support.h"

#include <gtest/gtest.h>

#include "ir/text.h"
#include "passes/pipeline.h"

namespace deepcompile {

std::string sections_text(const StepProgram& program) {
  std::string out;
  for (const Section& section : program.sections) {
    out += section_name(section) + "\n";
    for (const Instr& instr : section.instrs) out += "  " + print(program, instr) + "\n";
  }
  return out;
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << "nothing to replace: " << from;
  for (; at != std::string::npos; at = text.find(from, at + to.size())) {
    text.replace(at, from.size(), to);
  }
  return text;
}

StepProgram two_layers_zero3() {
  StepProgram program = parse_program(kTwoLayers);
  run_pipeline(program, PassRegistry::with_builtins(), {"zero3_compile"});
  return program;
}

const char kTwoLayers[] = R"(step two world=2 accumulation=1 reduce=f32

param a f32 128
param b f32 128
param norms f32 64 whole (a.norm, b.norm)

value x 256B
value h 1KiB
value s 2KiB
value loss 4B
value t.loss 4B
value d 1KiB
value g.a 512B grad=a
value g.b 512B grad=b
value g.n0 128B grad=norms
value g.n1 128B grad=norms[1]

region f.a code=0 workspace=100B time=10ns (x, a, norms) -> (h)
region f.b code=0 workspace=200B time=10ns (h, b, norms[1]) -> (s, loss)
region b.b code=1 workspace=300B time=20ns (t.loss, s, h, b) -> (d, g.b, g.n1)
region b.a code=1 workspace=400B time=20ns (d, x, a) -> (g.a, g.n0)

forward 0 (x) -> (loss)
  run f.a
  run f.b
end
backward 0 (t.loss) -> ()
  run b.b
  run b.a
end
update
end
)";

}  // namespace deepcompile
