// SPDX-License-Identifier: Apache-2.0
// Frame: the values of one call, by the plan's value slots, wherever they are.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "runtime/exec/region.h"
#include "runtime/memory/row_set.h"
#include "runtime/offload/host_link.h"

namespace deepcompile {

// A value that is on the host, or on its way there or back.
struct MovedValue {
  enum class At { kLeaving, kHost, kReturning };

  At at = At::kLeaving;
  HostBuffer host;
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;
  c10::TensorOptions options;
  uint32_t version = 0;  // the tensor's, when the copy out began
  at::Tensor arriving;   // allocated while it returns
  HostCopy copy;         // destroyed first: it may still use the tensors above
};

struct Frame {
  std::vector<RuntimeValue> slots;      // empty while a value is only on the host
  std::map<int32_t, MovedValue> moved;  // by slot
  // The rows that this call's numbers, and those of the other ranks, name; by slot.
  std::map<int32_t, std::shared_ptr<RowSet>> rows;

  RuntimeValue& at(int32_t slot) { return slots[static_cast<size_t>(slot)]; }
  const RuntimeValue& at(int32_t slot) const { return slots[static_cast<size_t>(slot)]; }
  // Its tensors on the device, and those that are on their way there; some undefined.
  template <typename Visitor>
  void visit(const Visitor& visitor) const {
    for (const RuntimeValue& value : slots) {
      if (value.isTensor()) visitor(value.toTensor());
    }
    for (const auto& [slot, value] : moved) visitor(value.arriving);
  }
  // The value dies here, wherever it is.
  void drop(int32_t slot) {
    at(slot) = RuntimeValue();
    moved.erase(slot);
  }
};

}  // namespace deepcompile
