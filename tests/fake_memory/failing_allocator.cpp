// SPDX-License-Identifier: Apache-2.0
// Allocations of host memory that fail as a device's do when it is full.
//
// On a CPU torch's allocator never throws c10::OutOfMemoryError. Loading this library puts an
// allocator before it that does, for chosen allocations of the thread that chose them: the
// runtime's instructions run on the caller's thread, transfers of Gloo on their own.
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <cstdint>

namespace {

struct Choice {
  int64_t bytes = 0;   // of the allocations that count; 0: all
  int64_t after = 0;   // so many succeed
  int64_t count = 0;   // and so many fail then
  int64_t failed = 0;  // so many have
};

thread_local Choice choice;

class FailingAllocator final : public c10::Allocator {
 public:
  explicit FailingAllocator(c10::Allocator* base) : base_(base) {}

  c10::DataPtr allocate(size_t bytes) override {
    if (chosen(static_cast<int64_t>(bytes))) {
      throw c10::OutOfMemoryError({__func__, __FILE__, static_cast<uint32_t>(__LINE__)},
                                  "no memory for " + std::to_string(bytes) + " bytes, as chosen");
    }
    return base_->allocate(bytes);
  }
  bool is_simple_data_ptr(const c10::DataPtr& data) const override {
    return base_->is_simple_data_ptr(data);
  }
  c10::DeleterFnPtr raw_deleter() const override { return base_->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    base_->copy_data(to, from, bytes);
  }

 private:
  static bool chosen(int64_t bytes) {
    if (choice.count == 0 || (choice.bytes != 0 && choice.bytes != bytes)) return false;
    if (choice.after > 0) {
      --choice.after;
      return false;
    }
    --choice.count;
    ++choice.failed;
    return true;
  }

  c10::Allocator* base_;
};

// In place from the library's loading on. Never destroyed: tensors may outlive all else.
[[maybe_unused]] const bool installed = [] {
  c10::SetCPUAllocator(new FailingAllocator(c10::GetCPUAllocator()), /*priority=*/100);
  return true;
}();

}  // namespace

// From now on, of this thread's allocations of `bytes` (0: of any size), `after` succeed and
// then `count` fail.
extern "C" void fail_allocations(int64_t bytes, int64_t after, int64_t count) {
  choice = {bytes, after, count, 0};
}

// How many have failed since.
extern "C" int64_t failed_allocations() {
  return choice.failed;
}
