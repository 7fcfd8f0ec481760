// SPDX-License-Identifier: Apache-2.0
// What the library's .cu files share; for nvcc only.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include "runtime/cuda/kernels.h"

namespace deepcompile::kernels {

// Makes the device current to this thread. 0, or what is wrong with it.
inline int use_device(int device) {
  int current = -1;
  if (cudaGetDevice(&current) == cudaSuccess && current == device) return 0;
  return static_cast<int>(cudaSetDevice(device));
}

// Blocks on a multiprocessor of kernels that do nothing but move memory. With more they have more
// loads under way than the memory can serve, and each load and copy of others waits behind them;
// two of 512 threads are as fast as a device copy but for 4 to 8% (docs/performance.md). To be
// given to __launch_bounds__ too: the compiler otherwise saves registers by putting loads off.
constexpr int kMemoryBlocks = 2;

// Lets no more than those be there at once, by the shared memory that launches are to ask for,
// which nobody uses. 0, or what went wrong.
template <typename Kernel>
int limit_blocks(Kernel kernel, int device, int* shared_bytes) {
  // Of each kernel on each device: asking takes longer than a launch.
  static std::mutex mutex;
  static std::map<std::pair<Kernel, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({kernel, device});
  if (found != known.end()) {
    *shared_bytes = found->second;
    return 0;
  }
  int whole = 0, reserved = 0, most = 0;
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(value, attribute, device);
  };
  cudaError_t status = ask(&whole, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  if (status == cudaSuccess) status = ask(&reserved, cudaDevAttrReservedSharedMemoryPerBlock);
  if (status == cudaSuccess) status = ask(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int bytes = std::min(whole / kMemoryBlocks - reserved, most);
  if (status == cudaSuccess) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  }
  if (status != cudaSuccess) return static_cast<int>(status);
  *shared_bytes = known[{kernel, device}] = bytes;
  return 0;
}

// 0 if the device has code for the kernel.
int adamw_usable();
int squared_sum_usable();
int piece_sum_usable();

}  // namespace deepcompile::kernels
