// SPDX-License-Identifier: Apache-2.0
// MemoryMeter: bytes of tensors on the device, at their most.
//
// On a device with a caching allocator the numbers are the allocator's. While
// a trace runs it resets the allocator's peak before each region, and keeps
// the largest itself. A CPU's allocator has no such numbers: there the meter
// counts what is allocated on the section's thread, on top of what the runtime
// holds, from the first reset on. Memory allocated before that is not seen to
// go, and torch says so in a warning: nobody counts unasked.
#pragma once

#include <c10/core/Device.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <unordered_set>
#include <vector>

#include "runtime/exec/region.h"

namespace deepcompile {

class MemoryMeter {
 public:
  explicit MemoryMeter(c10::Device device);
  ~MemoryMeter();

  // While it lives, on a CPU, allocations of this thread count.
  class Section {
   public:
    explicit Section(std::shared_ptr<c10::DebugInfoBase> counter);

   private:
    std::optional<c10::DebugInfoGuard> guard_;
  };
  // `held`: bytes of tensors there are now; asked for only if it matters.
  template <typename Held>
  Section section(Held&& held) {
    if (!counts()) return Section(nullptr);
    set_live(held());
    return Section(counter_base());
  }

  void begin_run(const std::vector<RuntimeValue>& inputs);
  // The most bytes since begin_run beyond those before and the outputs; -1 if unknown.
  int64_t end_run(const std::vector<RuntimeValue>& outputs);

  // The most bytes between the two, on a device; 0 on a CPU.
  void begin_step();
  int64_t end_step();

  void count_from_now();  // on a CPU: starts counting
  void reset_peak();
  int64_t peak_bytes() const;

 private:
  class Counter;

  bool counts() const { return counting_; }
  void fold_peak();  // takes the allocator's peak over, and resets it
  void set_live(int64_t bytes);
  std::shared_ptr<c10::DebugInfoBase> counter_base() const;

  c10::Device device_;
  bool counting_ = false;  // on a CPU only
  std::shared_ptr<Counter> counter_;
  int64_t peak_ = 0;       // before the allocator's peak was last reset
  int64_t step_peak_ = 0;  // the same since begin_step
  int64_t before_ = 0;     // bytes at begin_run
  std::unordered_set<const void*> inputs_;
};

}  // namespace deepcompile
