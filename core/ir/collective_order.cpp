// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "ir/text.h"
#include "ir/verifier.h"

namespace deepcompile {

std::vector<std::string> collective_order(const StepProgram& program) {
  std::vector<std::string> order;
  for (const Section& section : program.sections) {
    const std::string prefix = section_name(section) + ": ";
    for (const Instr& instr : section.instrs) {
      const OpTraits& of = traits(instr.op);
      if (!of.is_collective) continue;
      std::string call = prefix + std::string(of.name);
      if (instr.param) {
        call += " " + program.param(*instr.param).name;
        if (program.rows_input(section, *instr.param)) call += " by rows";
      }
      order.push_back(std::move(call));
    }
  }
  return order;
}

std::optional<std::string> order_difference(const std::vector<std::string>& a,
                                            const std::vector<std::string>& b) {
  const auto [at_a, at_b] = std::mismatch(a.begin(), a.end(), b.begin(), b.end());
  if (at_a == a.end() && at_b == b.end()) return std::nullopt;
  const auto show = [](const auto& at, const auto& order) {
    return at == order.end() ? std::string("nothing more") : "'" + *at + "'";
  };
  return "collective " + std::to_string(at_a - a.begin() + 1) + " is " + show(at_a, a) +
         " in one and " + show(at_b, b) + " in the other";
}

}  // namespace deepcompile
