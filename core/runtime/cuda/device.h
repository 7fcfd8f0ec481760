// SPDX-License-Identifier: Apache-2.0
// What the library's .cu files share; for nvcc only.
#pragma once

#include <cuda_runtime.h>

#include "runtime/cuda/kernels.h"

namespace deepcompile::kernels {

// Makes the device current to this thread. 0, or what is wrong with it.
inline int use_device(int device) {
  int current = -1;
  if (cudaGetDevice(&current) == cudaSuccess && current == device) return 0;
  return static_cast<int>(cudaSetDevice(device));
}

// 0 if the device has code for the kernel.
int adamw_usable();
int squared_sum_usable();
int piece_sum_usable();

}  // namespace deepcompile::kernels
