// SPDX-License-Identifier: Apache-2.0
// The sums of reductions' pieces: each is read once and the sum written once.
#include "runtime/cuda/device.h"
#include "runtime/cuda/piece_sum_body.h"

namespace deepcompile::kernels {
namespace {

template <typename T, int kCount>
__global__ void __launch_bounds__(kPieceThreads)
    piece_sums(const __grid_constant__ PieceTable table) {
  const int s = entry_of(table.first_block, table.sums, blockIdx.x);
  piece_sum_thread<T, kCount>(table.sum[s], table.count, blockIdx.x - table.first_block[s],
                              static_cast<int>(threadIdx.x));
}

using Kernel = void (*)(PieceTable);

struct Launch {
  Kernel kernel;
  int chunk;  // elements of a block
};

template <typename T>
Launch launch_for(int64_t count) {
  const auto of = [&]() -> Kernel {
    if (count == 2) return piece_sums<T, 2>;
    if (count == 4) return piece_sums<T, 4>;
    if (count == 8) return piece_sums<T, 8>;
    return piece_sums<T, 0>;
  };
  return {of(), kPieceChunk<T>};
}

Launch launch_for(int type, int64_t count) {
  switch (type) {
    case DEEPCOMPILE_CUDA_BF16:
      return launch_for<Bf16>(count);
    case DEEPCOMPILE_CUDA_F16:
      return launch_for<F16>(count);
    case DEEPCOMPILE_CUDA_F64:
      return launch_for<double>(count);
    default:
      return launch_for<float>(count);
  }
}

}  // namespace

int piece_sum_usable() {
  for (const int type :
       {DEEPCOMPILE_CUDA_F32, DEEPCOMPILE_CUDA_BF16, DEEPCOMPILE_CUDA_F16, DEEPCOMPILE_CUDA_F64}) {
    for (const int count : {2, 4, 8, 3}) {
      cudaFuncAttributes attributes;
      const cudaError_t status = cudaFuncGetAttributes(&attributes, launch_for(type, count).kernel);
      if (status != cudaSuccess) return static_cast<int>(status);
    }
  }
  return 0;
}

}  // namespace deepcompile::kernels

extern "C" int deepcompile_cuda_piece_sums(int device, void* stream,
                                           const deepcompile_cuda_sum* sums, int64_t count,
                                           int64_t pieces, int type) {
  using namespace deepcompile::kernels;
  int status = check_sums(sums, count, pieces, type);
  if (status != 0) return status;
  status = use_device(device);
  if (status != 0) return status;
  const Launch by = launch_for(type, pieces);
  const auto launch = [&](const PieceTable& table, uint32_t blocks) {
    by.kernel<<<blocks, kPieceThreads, 0, static_cast<cudaStream_t>(stream)>>>(table);
    return static_cast<int>(cudaGetLastError());
  };
  return for_each_piece_table(sums, count, pieces, by.chunk, launch);
}
