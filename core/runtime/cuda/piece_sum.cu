// SPDX-License-Identifier: Apache-2.0
// The sums of reductions' pieces: each is read once and the sum written once, or added once
// to its total.
#include "runtime/cuda/device.h"
#include "runtime/cuda/piece_sum_body.h"

namespace deepcompile::kernels {
namespace {

template <typename T, int kCount, bool kTotals>
__global__ void __launch_bounds__(kPieceThreads, kMemoryBlocks)
    piece_sums(const __grid_constant__ PieceTable table) {
  piece_sum_of_table<T, kCount, kTotals>(table, blockIdx.x, static_cast<int>(threadIdx.x));
}

using Kernel = void (*)(PieceTable);

struct Launch {
  Kernel kernel;
  int chunk;  // elements of a block
};

template <typename T, bool kTotals>
Launch launch_for(int64_t count) {
  const auto of = [&]() -> Kernel {
    if (count == 2) return piece_sums<T, 2, kTotals>;
    if (count == 4) return piece_sums<T, 4, kTotals>;
    if (count == 8) return piece_sums<T, 8, kTotals>;
    return piece_sums<T, 0, kTotals>;
  };
  return {of(), kPieceChunk<T, kTotals>};
}

template <bool kTotals>
Launch launch_for(int type, int64_t count) {
  switch (type) {
    case DEEPCOMPILE_CUDA_BF16:
      return launch_for<Bf16, kTotals>(count);
    case DEEPCOMPILE_CUDA_F16:
      return launch_for<F16, kTotals>(count);
    case DEEPCOMPILE_CUDA_F64:
      return launch_for<double, kTotals>(count);
    default:
      return launch_for<float, kTotals>(count);
  }
}

template <bool kTotals>
int run(int device, void* stream, const deepcompile_cuda_sum* sums, int64_t count, int64_t pieces,
        int type, double scale) {
  int status = check_sums(sums, count, pieces, type, kTotals);
  if (status != 0) return status;
  status = use_device(device);
  if (status != 0) return status;
  const Launch by = launch_for<kTotals>(type, pieces);
  int shared_bytes = 0;
  status = limit_blocks(by.kernel, device, &shared_bytes);
  if (status != 0) return status;
  const auto launch = [&](const PieceTable& table, uint32_t blocks) {
    by.kernel<<<blocks, kPieceThreads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(table);
    return static_cast<int>(cudaGetLastError());
  };
  return for_each_piece_table(sums, count, pieces, scale, by.chunk, launch);
}

template <bool kTotals>
int usable() {
  for (const int type :
       {DEEPCOMPILE_CUDA_F32, DEEPCOMPILE_CUDA_BF16, DEEPCOMPILE_CUDA_F16, DEEPCOMPILE_CUDA_F64}) {
    for (const int count : {2, 4, 8, 3}) {
      cudaFuncAttributes attributes;
      const Launch launch = launch_for<kTotals>(type, count);
      const cudaError_t status = cudaFuncGetAttributes(&attributes, launch.kernel);
      if (status != cudaSuccess) return static_cast<int>(status);
    }
  }
  return 0;
}

}  // namespace

int piece_sum_usable() {
  const int status = usable<false>();
  return status != 0 ? status : usable<true>();
}

}  // namespace deepcompile::kernels

extern "C" int deepcompile_cuda_piece_sums(int device, void* stream,
                                           const deepcompile_cuda_sum* sums, int64_t count,
                                           int64_t pieces, int type) {
  return deepcompile::kernels::run<false>(device, stream, sums, count, pieces, type, 1);
}

extern "C" int deepcompile_cuda_piece_totals(int device, void* stream,
                                             const deepcompile_cuda_sum* sums, int64_t count,
                                             int64_t pieces, int type, double scale) {
  return deepcompile::kernels::run<true>(device, stream, sums, count, pieces, type, scale);
}
