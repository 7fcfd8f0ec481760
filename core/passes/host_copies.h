// SPDX-License-Identifier: Apache-2.0
// When copies to the host and back should stand where: what
// offload_activation and offload_adam_states do alike. Each direction of the
// host link carries one copy at a time, in issue order, beside compute.
#pragma once

#include <cstddef>
#include <optional>
#include <vector>

#include "analysis/memory_timeline.h"
#include "passes/memory_use.h"
#include "passes/section_edit.h"
#include "passes/step_clock.h"

namespace deepcompile {

// Without a budget, no more copies than this are ahead of, or behind, compute.
inline constexpr size_t kCopiesAhead = 2;

struct OutboundCopy {
  size_t issued = 0;           // the point before which it starts
  size_t first = 0, last = 0;  // the device memory is given back before one of these
  Nanos time;
  Bytes bytes;
};

struct InboundCopy {
  size_t first = 0;   // it starts before this point or a later one
  size_t needed = 0;  // and is done before this one
  Nanos time;
  Bytes bytes;
};

// Where copies out are expected to be done. Ask for them in issue order.
class OutboundQueue {
 public:
  explicit OutboundQueue(const StepClock& clock) : clock_(clock) {}

  // The point at which the copy is done, or `last`, or an earlier one that
  // would be over the limit: there memory cannot wait. `use` counts the bytes.
  size_t place(const OutboundCopy& copy, const MemoryUse& use, std::optional<Bytes> limit);
  // When the copy placed last is done.
  Nanos done() const { return free_; }

 private:
  const StepClock& clock_;
  Nanos free_;
};

// Where copies in start, in the order in which they are needed: as late as
// they are still in time, and not before there is room. `copies` are in that
// order; `use` does not count their bytes at first, and does at last, from
// each start to `needed`.
std::vector<size_t> place_copies_in(const StepClock& clock, const std::vector<InboundCopy>& copies,
                                    std::optional<Bytes> limit, MemoryUse* use);

// The peak of the program with these instructions.
Bytes peak_with(const StepProgram& program, const SectionInstrs& instrs);

// The bytes at each point of a step, and after its last.
std::vector<Bytes> bytes_during(const MemoryTimeline& timeline);

// The latest points at which they can start and be in time one after the other.
std::vector<size_t> latest_starts(const StepClock& clock, const std::vector<InboundCopy>& copies);
// The first point from `start` on after which there is room up to `needed`.
size_t with_room(const InboundCopy& copy, size_t start, std::optional<Bytes> limit,
                 const MemoryUse& use);

}  // namespace deepcompile
