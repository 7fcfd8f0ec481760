// SPDX-License-Identifier: Apache-2.0
// A stand-in for libdeepcompile_cuda.so that runs nowhere but on "device 0": for
// the tests of its loader. FAKE_ABI: the version it claims.
#include "runtime/cuda/kernels.h"

extern "C" {

int deepcompile_cuda_abi(void) {
  return FAKE_ABI;
}

#ifndef FAKE_INCOMPLETE
const char* deepcompile_cuda_error(int status) {
  return status == DEEPCOMPILE_CUDA_BAD_DEVICE ? "no code for it" : "some error";
}

int deepcompile_cuda_usable(int device) {
  return device == 0 ? 0 : DEEPCOMPILE_CUDA_BAD_DEVICE;
}

int deepcompile_cuda_adamw(int, void*, const deepcompile_cuda_adamw_segment*, int64_t count, int,
                           int, const float*) {
  return static_cast<int>(count);
}

int64_t deepcompile_cuda_squared_sum_partials(const deepcompile_cuda_gradient*, int64_t count) {
  return count;
}

int deepcompile_cuda_squared_sum(int, void*, const deepcompile_cuda_gradient*, int64_t, double*,
                                 int64_t, void*, int) {
  return 0;
}

int deepcompile_cuda_piece_sums(int, void*, const deepcompile_cuda_sum*, int64_t, int64_t, int) {
  return 0;
}

int deepcompile_cuda_piece_totals(int, void*, const deepcompile_cuda_sum*, int64_t, int64_t, int,
                                  double) {
  return 0;
}
#endif
}
