// SPDX-License-Identifier: Apache-2.0
// HostQueues: copies over the host link. Each direction carries one at a time,
// in issue order; while both are busy each keeps a fraction of its speed. A
// copy issued later so delays earlier ones of the other direction, and an end
// is known once time is there, or as far as nothing is issued before it.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "base/units.h"
#include "cost/host_beside.h"
#include "ir/op.h"

namespace deepcompile {

struct Span {
  Nanos start, end;
};

// Throw UserError if a step, or one thing of it, takes longer than any may: times that are added
// up stay numbers.
void check_time(Nanos time);
void check_duration(Nanos duration);

class HostQueues {
 public:
  explicit HostQueues(const HostBeside& beside);

  // `queue` is kToHost or kToDevice. Its next copy, of this undisturbed
  // duration; returns its number. Times passed in never fall.
  uint32_t issue(Resource queue, Nanos now, Nanos duration);
  // When a copy is done. Nothing may be issued before that time any more.
  Nanos finish(Resource queue, uint32_t copy);

  // When each direction will be idle if nothing more is issued (to the host,
  // to the device); some time in the past if it is.
  std::array<Nanos, 2> idle() const;
  // Sets the spans of copies under way to what they will be in that case.
  void foresee();
  const Span& span(Resource queue, uint32_t copy) const { return queues_[way(queue)][copy].span; }

 private:
  struct Copy {
    Nanos duration;
    Span span;
  };
  struct State {
    Nanos time;
    std::array<uint32_t, 2> next{};  // copy under way, if there is one
    std::array<double, 2> left{};    // of it, undisturbed ns
  };

  static size_t way(Resource queue) { return queue == Resource::kToHost ? 0 : 1; }
  bool is_busy(const State& state, size_t way) const {
    return state.next[way] < queues_[way].size();
  }
  int pass(State& state, Nanos limit) const;
  void set_spans(const State& state, size_t ended);

  std::array<double, 2> beside_;
  std::array<std::vector<Copy>, 2> queues_;  // all copies ever issued
  State state_;
};

}  // namespace deepcompile
