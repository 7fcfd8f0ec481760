// SPDX-License-Identifier: Apache-2.0
// AdamW on many segments in one launch. It reads and writes each byte once, so
// its time is the memory's: 28 bytes an element with bf16 gradients and weights.
#include "runtime/cuda/adamw_body.h"
#include "runtime/cuda/adamw_table.h"
#include "runtime/cuda/device.h"

namespace deepcompile::kernels {
namespace {

template <typename Grad, typename Weight>
__global__ void __launch_bounds__(kAdamThreads, kMemoryBlocks)
    adamw(const __grid_constant__ AdamTable table) {
  const float factor = table.factor == nullptr ? 1.0f : *table.factor;
  const int s = entry_of(table.first_block, table.segments, blockIdx.x);
  adamw_thread<Grad, Weight>(table.segment[s], factor, blockIdx.x - table.first_block[s],
                             static_cast<int>(threadIdx.x));
}

using Kernel = void (*)(AdamTable);

template <typename Grad>
Kernel kernel_for(int weight_type) {
  switch (weight_type) {
    case DEEPCOMPILE_CUDA_BF16:
      return adamw<Grad, Bf16>;
    case DEEPCOMPILE_CUDA_F16:
      return adamw<Grad, F16>;
    default:
      return adamw<Grad, NoWeight>;
  }
}

Kernel kernel_for(int gradient_type, int weight_type) {
  switch (gradient_type) {
    case DEEPCOMPILE_CUDA_BF16:
      return kernel_for<Bf16>(weight_type);
    case DEEPCOMPILE_CUDA_F16:
      return kernel_for<F16>(weight_type);
    default:
      return kernel_for<float>(weight_type);
  }
}

}  // namespace

int adamw_usable() {
  // All of them: asking loads a kernel, which must not wait until a graph is captured.
  for (const int gradient : {DEEPCOMPILE_CUDA_F32, DEEPCOMPILE_CUDA_BF16, DEEPCOMPILE_CUDA_F16}) {
    for (const int weight : {DEEPCOMPILE_CUDA_NONE, DEEPCOMPILE_CUDA_BF16, DEEPCOMPILE_CUDA_F16}) {
      cudaFuncAttributes attributes;
      const cudaError_t status = cudaFuncGetAttributes(&attributes, kernel_for(gradient, weight));
      if (status != cudaSuccess) return static_cast<int>(status);
    }
  }
  return 0;
}

}  // namespace deepcompile::kernels

extern "C" int deepcompile_cuda_adamw(int device, void* stream,
                                      const deepcompile_cuda_adamw_segment* segments, int64_t count,
                                      int gradient_type, int weight_type, const float* factor) {
  using namespace deepcompile::kernels;
  int status = check_adamw(segments, count, gradient_type, weight_type);
  if (status != 0) return status;
  if (factor != nullptr && !usable_pointer(factor, 4)) return DEEPCOMPILE_CUDA_BAD_POINTER;
  status = use_device(device);
  if (status != 0) return status;
  const Kernel kernel = kernel_for(gradient_type, weight_type);
  int shared_bytes = 0;
  status = limit_blocks(kernel, device, &shared_bytes);
  if (status != 0) return status;
  const auto launch = [&](const AdamTable& table, uint32_t blocks) {
    kernel<<<blocks, kAdamThreads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(table);
    return static_cast<int>(cudaGetLastError());
  };
  return for_each_adamw_table(segments, count, gradient_type, weight_type, factor, launch);
}
