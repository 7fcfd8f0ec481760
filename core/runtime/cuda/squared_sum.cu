// SPDX-License-Identifier: Apache-2.0
// The sum of squares of many gradients: partial sums of fixed chunks, then their
// sum, each by a fixed tree. No atomics: the same bits in every run.
#include "runtime/cuda/device.h"
#include "runtime/cuda/squared_sum_body.h"

namespace deepcompile::kernels {
namespace {

// The block's sum of `value`, in thread 0: halves of a warp, then halves of the warps.
template <int kThreads>
__device__ double block_sum(double value) {
  constexpr int kWarps = kThreads / 32;
  __shared__ double warps[kWarps];
  for (int half = 16; half > 0; half /= 2) value += __shfl_down_sync(0xffffffffu, value, half);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x >= 32) return 0.0;
  value = threadIdx.x < kWarps ? warps[threadIdx.x] : 0.0;
  for (int half = kWarps / 2; half > 0; half /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, half);
  }
  return value;
}

__global__ void __launch_bounds__(kSumThreads, kMemoryBlocks)
    squared_sums(const __grid_constant__ SumTable table) {
  const int g = entry_of(table.first_block, table.gradients, blockIdx.x);
  const GradientArgument& gradient = table.gradient[g];
  const double sum = block_sum<kSumThreads>(squared_sum_thread(
      gradient, blockIdx.x - table.first_block[g], static_cast<int>(threadIdx.x)));
  if (threadIdx.x == 0) table.partials[blockIdx.x] = sum * (gradient.scale * gradient.scale);
}

__global__ void __launch_bounds__(kTotalThreads)
    total(const double* partials, int64_t count, void* out, bool wide) {
  const double sum =
      block_sum<kTotalThreads>(total_thread(partials, count, static_cast<int>(threadIdx.x)));
  if (threadIdx.x != 0) return;
  if (wide) {
    *static_cast<double*>(out) = sum;
  } else {
    *static_cast<float*>(out) = static_cast<float>(sum);
  }
}

}  // namespace

int squared_sum_usable() {
  cudaFuncAttributes attributes;
  cudaError_t status = cudaFuncGetAttributes(&attributes, squared_sums);
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, total);
  return static_cast<int>(status);
}

}  // namespace deepcompile::kernels

extern "C" int64_t deepcompile_cuda_squared_sum_partials(const deepcompile_cuda_gradient* gradients,
                                                         int64_t count) {
  int64_t blocks = 0;
  for (int64_t i = 0; i < count; ++i) blocks += deepcompile::kernels::sum_blocks(gradients[i]);
  return blocks;
}

extern "C" int deepcompile_cuda_squared_sum(int device, void* stream,
                                            const deepcompile_cuda_gradient* gradients,
                                            int64_t count, double* partials, int64_t partials_count,
                                            void* out, int out_type) {
  using namespace deepcompile::kernels;
  int status = check_gradients(gradients, count);
  if (status != 0) return status;
  if (out_type != DEEPCOMPILE_CUDA_F32 && out_type != DEEPCOMPILE_CUDA_F64) {
    return DEEPCOMPILE_CUDA_BAD_TYPE;
  }
  if (!usable_pointer(out, type_bytes(out_type))) return DEEPCOMPILE_CUDA_BAD_POINTER;
  const int64_t needed = deepcompile_cuda_squared_sum_partials(gradients, count);
  if (needed > partials_count) return DEEPCOMPILE_CUDA_BAD_WORKSPACE;
  if (needed > 0 && !usable_pointer(partials, 8)) return DEEPCOMPILE_CUDA_BAD_POINTER;
  status = use_device(device);
  if (status != 0) return status;
  const auto on = static_cast<cudaStream_t>(stream);
  status =
      for_each_sum_table(gradients, count, partials, [&](const SumTable& table, uint32_t blocks) {
        squared_sums<<<blocks, kSumThreads, 0, on>>>(table);
        return static_cast<int>(cudaGetLastError());
      });
  if (status != 0) return status;
  total<<<1, kTotalThreads, 0, on>>>(partials, needed, out, out_type == DEEPCOMPILE_CUDA_F64);
  return static_cast<int>(cudaGetLastError());
}
