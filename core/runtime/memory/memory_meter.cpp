// SPDX-License-Identifier: Apache-2.0
#include "runtime/memory/memory_meter.h"

#include <ATen/core/Tensor.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <torch/csrc/profiler/orchestration/observer.h>

#include <algorithm>
#include <atomic>

#include "runtime/memory/device_memory.h"

namespace deepcompile {
namespace {

using torch::profiler::impl::ActiveProfilerType;
using torch::profiler::impl::ProfilerConfig;
using torch::profiler::impl::ProfilerState;

const void* storage_of(const RuntimeValue& value) {
  if (!value.isTensor() || !value.toTensor().defined()) return nullptr;
  return value.toTensor().storage().unsafeGetStorageImpl();
}

}  // namespace

// Sits where a profiler would, disabled, and so must be one: torch asks
// whatever sits there for its configuration.
class MemoryMeter::Counter final : public torch::profiler::impl::ProfilerStateBase {
 public:
  Counter() : ProfilerStateBase(ProfilerConfig(ProfilerState::Disabled)) {}

  void reportMemoryUsage(void*, int64_t bytes, size_t, size_t, c10::Device device) override {
    if (!device.is_cpu()) return;
    const int64_t live = live_ += bytes;
    int64_t peak = peak_;
    while (peak < live && !peak_.compare_exchange_weak(peak, live)) {
    }
    peak = run_peak_;
    while (peak < live && !run_peak_.compare_exchange_weak(peak, live)) {
    }
  }
  bool memoryProfilingEnabled() const override { return true; }
  ActiveProfilerType profilerType() override { return ActiveProfilerType::NONE; }

  std::atomic<int64_t> live_{0};
  std::atomic<int64_t> peak_{0};
  std::atomic<int64_t> run_peak_{0};
};

MemoryMeter::Section::Section(std::shared_ptr<c10::DebugInfoBase> counter) {
  // A profiler of the user's keeps its place.
  const auto kPlace = c10::DebugInfoKind::PROFILER_STATE;
  if (!counter || c10::ThreadLocalDebugInfo::get(kPlace) != nullptr) return;
  guard_.emplace(kPlace, std::move(counter));
}

MemoryMeter::MemoryMeter(c10::Device device) : device_(device) {}
MemoryMeter::~MemoryMeter() = default;

void MemoryMeter::set_live(int64_t bytes) {
  counter_->live_ = bytes;
  counter_->peak_ = std::max<int64_t>(counter_->peak_, bytes);
}

std::shared_ptr<c10::DebugInfoBase> MemoryMeter::counter_base() const {
  return counter_;
}

void MemoryMeter::begin_run(const std::vector<RuntimeValue>& inputs) {
  inputs_.clear();
  for (const RuntimeValue& value : inputs) inputs_.insert(storage_of(value));
  if (counting_) {
    before_ = counter_->live_;
    counter_->run_peak_ = before_;
  } else if (!device_.is_cpu()) {
    fold_peak();
    before_ = device_memory(device_).allocated.current;
  }
}

void MemoryMeter::fold_peak() {
  const int64_t peak = device_memory(device_).allocated.peak;
  peak_ = std::max(peak_, peak);
  step_peak_ = std::max(step_peak_, peak);
  c10::getDeviceAllocator(device_.type())->resetPeakStats(device_.index());
}

void MemoryMeter::begin_step() {
  if (!device_.is_cpu()) fold_peak();
  step_peak_ = 0;
}

int64_t MemoryMeter::end_step() {
  if (!device_.is_cpu()) fold_peak();
  return step_peak_;
}

int64_t MemoryMeter::end_run(const std::vector<RuntimeValue>& outputs) {
  if (device_.is_cpu() && !counting_) return -1;
  int64_t bytes =
      (counting_ ? counter_->run_peak_.load() : device_memory(device_).allocated.peak) - before_;
  for (const RuntimeValue& value : outputs) {
    const void* storage = storage_of(value);
    if (storage == nullptr || !inputs_.insert(storage).second) continue;
    bytes -= static_cast<int64_t>(value.toTensor().storage().nbytes());
  }
  inputs_.clear();
  return std::max<int64_t>(bytes, 0);
}

void MemoryMeter::count_from_now() {
  if (!device_.is_cpu() || counting_) return;
  counter_ = std::make_shared<Counter>();
  counting_ = true;
}

void MemoryMeter::reset_peak() {
  peak_ = 0;
  count_from_now();
  if (counting_) {
    counter_->peak_ = 0;
  } else {
    c10::getDeviceAllocator(device_.type())->resetPeakStats(device_.index());
  }
}

int64_t MemoryMeter::peak_bytes() const {
  if (counting_) return counter_->peak_;
  if (device_.is_cpu()) return 0;
  return std::max(peak_, device_memory(device_).allocated.peak);
}

}  // namespace deepcompile
