// SPDX-License-Identifier: Apache-2.0
// The library's version, its errors in words, and which devices it has code for.
#include "runtime/cuda/device.h"

extern "C" int deepcompile_cuda_abi(void) {
  return DEEPCOMPILE_CUDA_ABI;
}

extern "C" const char* deepcompile_cuda_error(int status) {
  switch (status) {
    case 0:
      return "no error";
    case DEEPCOMPILE_CUDA_BAD_TYPE:
      return "an element type that this kernel does not take";
    case DEEPCOMPILE_CUDA_BAD_POINTER:
      return "a pointer that is null or not aligned to its elements";
    case DEEPCOMPILE_CUDA_BAD_NUMEL:
      return "a number of elements that is negative or too large";
    case DEEPCOMPILE_CUDA_BAD_STEP:
      return "a step number below 1";
    case DEEPCOMPILE_CUDA_BAD_WORKSPACE:
      return "too few partial sums";
    case DEEPCOMPILE_CUDA_BAD_DEVICE:
      return "the kernels have no code for this device";
    default:
      return cudaGetErrorString(static_cast<cudaError_t>(status));
  }
}

extern "C" int deepcompile_cuda_usable(int device) {
  int status = deepcompile::kernels::use_device(device);
  if (status == 0) status = deepcompile::kernels::adamw_usable();
  if (status == 0) status = deepcompile::kernels::squared_sum_usable();
  if (status == 0) status = deepcompile::kernels::piece_sum_usable();
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction) {
    status = DEEPCOMPILE_CUDA_BAD_DEVICE;
  }
  if (status != 0) cudaGetLastError();  // it was said; the next call begins without it
  return status;
}
