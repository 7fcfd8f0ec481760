// SPDX-License-Identifier: Apache-2.0
// What the device's caching allocator says of all its pools.
#pragma once

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Device.h>

namespace deepcompile {

struct DeviceMemory {
  c10::CachingAllocator::Stat allocated;  // bytes of tensors
  c10::CachingAllocator::Stat reserved;   // bytes taken from the driver
};

// Of a device that is no CPU.
inline DeviceMemory device_memory(c10::Device device) {
  constexpr auto kAll = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
  const auto stats = c10::getDeviceAllocator(device.type())->getDeviceStats(device.index());
  return {stats.allocated_bytes[kAll], stats.reserved_bytes[kAll]};
}

}  // namespace deepcompile
