// SPDX-License-Identifier: Apache-2.0
// Relief: makes room on the device when an instruction has none.
//
// No rank may leave out a collective, so a rank without memory helps itself:
// first optimizer states go to the host, then saved values that the
// instruction does not use, of this call and of all that are open, then the
// full buffers of parameters that a plan keeps whole. They come back when
// something needs them. The bits stay; the time goes.
//
// Callers: the executor, under the runtime's lock.
#pragma once

#include <cstdint>
#include <set>
#include <string>

#include "runtime/exec/call_table.h"
#include "runtime/memory/param_store.h"
#include "runtime/offload/state_mover.h"
#include "runtime/offload/value_mover.h"

namespace deepcompile {

struct ReliefReport {
  int64_t times = 0;  // instructions that were tried again
  int64_t states_bytes = 0;
  int64_t values_bytes = 0;
  int64_t params_bytes = 0;
};

// What an instruction uses, and so must stay.
struct Needed {
  const ParamState* states = nullptr;  // whose optimizer states; null: none
  std::set<const ParamState*> params;
  std::set<int32_t> slots;
};

class Relief {
 public:
  Relief(ParamStore& store, StateMover& states, ValueMover& values, CallTable& calls,
         c10::Device device);

  // As if the device had `bytes`; 0: as it is.
  void limit(int64_t bytes) { limit_ = bytes; }
  bool limited() const { return limit_ > 0; }
  // Looks how much room the device has: once a section, as it asks the driver.
  // `kept`: bytes that the allocator counts as free and does not give out.
  void look(int64_t kept);
  // Whether memory is short, so that a region may have to be tried again and
  // its inputs must be kept until it has run.
  bool armed() const;
  // Whether memory would be short with `more` bytes allocated.
  bool is_short_of(int64_t more) const;

  // Throws c10::OutOfMemoryError if what is held and `more` bytes pass the limit.
  void check(const Frame& frame, int64_t more) const;
  // Frees more with every attempt, from 0. False if nothing is left to free.
  bool relieve(int attempt, Frame* frame, const Needed& needed);

  int64_t held_bytes(const Frame& frame) const;        // on the device, that the runtime knows of
  std::string held_by_kind(const Frame& frame) const;  // the same, for a message
  ReliefReport take_report();

 private:
  int64_t evict_states(int64_t wanted, const ParamState* user);
  int64_t evict_values(int64_t wanted, Frame* frame, const std::set<int32_t>& used);
  int64_t evict_params(int64_t wanted, const std::set<const ParamState*>& used);

  ParamStore& store_;
  StateMover& states_;
  ValueMover& values_;
  CallTable& calls_;
  c10::Device device_;
  int64_t limit_ = 0;
  int64_t room_ = 0;       // when last looked: bytes that could be allocated, and
  int64_t allocated_ = 0;  // that were
  int64_t scarce_ = 0;     // less room than this is short
  ReliefReport report_;
};

}  // namespace deepcompile
