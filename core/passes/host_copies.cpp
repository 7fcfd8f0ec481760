// SPDX-License-Identifier: Apache-2.0
#include "passes/host_copies.h"

#include <algorithm>

namespace deepcompile {

Bytes peak_with(const StepProgram& program, const SectionInstrs& instrs) {
  StepProgram trial = program;
  replace_instrs(instrs, &trial);
  return memory_peak(trial);
}

std::vector<Bytes> bytes_during(const MemoryTimeline& timeline) {
  std::vector<Bytes> out = bytes_during(std::span(timeline.points));
  out.push_back(timeline.points.empty() ? timeline.base : timeline.points.back().after);
  return out;
}

size_t OutboundQueue::place(const OutboundCopy& copy, const MemoryUse& use,
                            std::optional<Bytes> limit) {
  free_ = std::max(free_, clock_.before(copy.issued)) + copy.time;
  const size_t done = clock_.first_at(free_, copy.first, copy.last);
  if (!limit) return done;
  return use.first_above(copy.first, done, *limit).value_or(done);
}

std::vector<size_t> latest_starts(const StepClock& clock, const std::vector<InboundCopy>& copies) {
  std::vector<size_t> out(copies.size());
  for (size_t i = copies.size(); i-- > 0;) {
    Nanos end = clock.before(copies[i].needed);
    if (i + 1 < copies.size()) end = std::min(end, clock.before(out[i + 1]));
    out[i] = clock.last_at(end - copies[i].time, copies[i].first, copies[i].needed);
    if (i + 1 < copies.size()) out[i] = std::min(out[i], out[i + 1]);
    out[i] = std::max(out[i], copies[i].first);
  }
  return out;
}

size_t with_room(const InboundCopy& copy, size_t start, std::optional<Bytes> limit,
                 const MemoryUse& use) {
  if (!limit) return start;
  const auto full = use.last_above(start, copy.needed, *limit - copy.bytes);
  return full ? *full + 1 : start;
}

std::vector<size_t> place_copies_in(const StepClock& clock, const std::vector<InboundCopy>& copies,
                                    std::optional<Bytes> limit, MemoryUse* use) {
  std::vector<size_t> out = latest_starts(clock, copies);
  for (size_t i = 0; i < copies.size(); ++i) {
    if (i > 0) out[i] = std::max(out[i], std::min(out[i - 1], copies[i].needed));
    if (!limit && i >= kCopiesAhead) out[i] = std::max(out[i], copies[i - kCopiesAhead].needed);
    out[i] = with_room(copies[i], out[i], limit, *use);
    use->add(out[i], copies[i].needed, copies[i].bytes);
  }
  return out;
}

}  // namespace deepcompile
