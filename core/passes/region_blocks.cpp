// SPDX-License-Identifier: Apache-2.0
#include "passes/region_blocks.h"

#include <algorithm>

namespace deepcompile {
namespace {

constexpr size_t kLargestMarkedBlock = 16;

// Runs [first, last) repeat a sequence of `period` codes.
struct Repeats {
  size_t first = 0, last = 0, period = 1;
};

// The stretch that covers most; of equal ones that with the shortest period,
// then the first.
Repeats find_repeats(const std::vector<uint32_t>& codes) {
  Repeats best;
  for (size_t period = 1; 2 * period <= codes.size(); ++period) {
    size_t first = 0;
    for (size_t i = 0; i + period <= codes.size(); ++i) {
      if (i + period < codes.size() && codes[i] == codes[i + period]) continue;
      const size_t last = i + period;
      if (last - first >= 2 * period && last - first > best.last - best.first) {
        best = {first, last, period};
      }
      first = i + 1;
    }
  }
  return best;
}

// crossing[i]: bytes made before run i and read by it or a later one.
std::vector<int64_t> bytes_crossing(const StepProgram& program, const std::vector<RegionId>& runs) {
  std::vector<size_t> made(program.values.size(), runs.size()), last(program.values.size(), 0);
  for (size_t i = 0; i < runs.size(); ++i) {
    const Region& region = program.region(runs[i]);
    for (const Operand& operand : region.inputs) {
      if (const auto* id = std::get_if<ValueId>(&operand)) last[index(*id)] = i;
    }
    for (ValueId id : region.outputs) made[index(id)] = i;
  }
  std::vector<int64_t> out(runs.size() + 1, 0);
  for (size_t v = 0; v < made.size(); ++v) {
    if (made[v] >= last[v]) continue;
    out[made[v] + 1] += program.values[v].bytes.value;
    out[last[v] + 1] -= program.values[v].bytes.value;
  }
  for (size_t i = 1; i < out.size(); ++i) out[i] += out[i - 1];
  return out;
}

// Where in a period the fewest bytes cross, away from the stretch's ends.
size_t best_phase(const Repeats& repeats, const std::vector<int64_t>& crossing) {
  const size_t middle =
      repeats.first + (repeats.last - repeats.first) / repeats.period / 2 * repeats.period;
  size_t best = 0;
  for (size_t phase = 1; phase < repeats.period && middle + phase < repeats.last; ++phase) {
    if (crossing[middle + phase] < crossing[middle + best]) best = phase;
  }
  return best;
}

}  // namespace

std::vector<size_t> divide_into_blocks(const StepProgram& program,
                                       const std::vector<RegionId>& runs) {
  std::vector<uint32_t> codes;
  for (RegionId id : runs) codes.push_back(program.region(id).code);
  const Repeats repeats = find_repeats(codes);
  const size_t phase = best_phase(repeats, bytes_crossing(program, runs));
  std::vector<size_t> out;
  size_t length = 0;  // of the block so far
  for (size_t i = 0; i < runs.size(); ++i, ++length) {
    bool cut = i > 0;
    if (i > repeats.first && i < repeats.last) {
      cut = (i - repeats.first) % repeats.period == phase;
    } else if (i > 0 && i != repeats.first && i != repeats.last) {
      const bool marked =
          program.region(runs[i - 1]).checkpoint && program.region(runs[i]).checkpoint;
      cut = !marked || length == kLargestMarkedBlock;
    }
    if (cut) length = 0;
    out.push_back(out.empty() ? 0 : out.back() + (cut ? 1 : 0));
  }
  return out;
}

}  // namespace deepcompile
