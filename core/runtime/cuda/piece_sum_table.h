// SPDX-License-Identifier: Apache-2.0
// Sums of equally long arrays: what a launch of the kernel is given, and the checks of what callers
// give. Without CUDA.
#pragma once

#include <cstdint>

#include "runtime/cuda/kernels.h"
#include "runtime/cuda/launch_table.h"
#include "runtime/cuda/numbers.h"

namespace deepcompile::kernels {

constexpr int kPieceThreads = 512;  // of a block
constexpr int kMaxPieces = DEEPCOMPILE_CUDA_MAX_PIECES;

constexpr int kSums = 24;  // of one launch

struct PieceSum {
  const void* piece[kMaxPieces];
  void* out;
  int64_t numel;
  bool aligned;  // all of them, to 16 bytes
  bool first;    // of a total
};

struct PieceTable {
  PieceSum sum[kSums];
  uint32_t first_block[kSums + 1];
  int32_t sums;
  int32_t count;  // of pieces
  double scale;   // of totals
};
static_assert(sizeof(PieceTable) <= kMaxTable);

using SumArgument = deepcompile_cuda_sum;

// 0, or a deepcompile_cuda_refusal. The bytes of an element: of pieces, and of out.
inline int check_sum(const SumArgument& sum, int64_t pieces, int64_t element, int64_t out) {
  if (sum.numel < 0 || sum.numel / kPieceThreads >= kMaxBlocks) return DEEPCOMPILE_CUDA_BAD_NUMEL;
  if (sum.numel == 0) return 0;
  bool usable = usable_pointer(sum.out, out);
  for (int64_t p = 0; p < pieces; ++p) usable = usable && usable_pointer(sum.pieces[p], element);
  return usable ? 0 : DEEPCOMPILE_CUDA_BAD_POINTER;
}

inline int check_sums(const SumArgument* sums, int64_t count, int64_t pieces, int type,
                      bool totals) {
  const int64_t element = type_bytes(type);
  const int64_t out = totals && element < 4 ? 4 : element;
  if (element == 0) return DEEPCOMPILE_CUDA_BAD_TYPE;
  if (pieces < 1 || pieces > kMaxPieces) return DEEPCOMPILE_CUDA_BAD_POINTER;
  if (count < 0 || (count > 0 && sums == nullptr)) return DEEPCOMPILE_CUDA_BAD_POINTER;
  for (int64_t i = 0; i < count; ++i) {
    const int status = check_sum(sums[i], pieces, element, out);
    if (status != 0) return status;
  }
  return 0;
}

inline PieceSum piece_sum(const SumArgument& from, int64_t pieces) {
  PieceSum sum = {};
  sum.out = from.out;
  sum.numel = from.numel;
  sum.first = from.first != 0;
  sum.aligned = usable_pointer(from.out, 16);
  for (int64_t p = 0; p < pieces; ++p) {
    sum.piece[p] = from.pieces[p];
    sum.aligned = sum.aligned && usable_pointer(from.pieces[p], 16);
  }
  return sum;
}

// Calls launch(table, blocks) -> int for as few tables as hold all sums; ends with
// the first that is not 0. `chunk`: elements of a block; `scale`: of totals. The sums
// were checked.
template <typename Launch>
int for_each_piece_table(const SumArgument* sums, int64_t count, int64_t pieces, double scale,
                         int64_t chunk, Launch&& launch) {
  PieceTable table = {};
  table.scale = scale;
  table.count = static_cast<int32_t>(pieces);
  return for_each_launch(
      count, kSums, table.first_block,
      [&](int64_t i) { return (sums[i].numel + chunk - 1) / chunk; },
      [&](int64_t i, int entry) { table.sum[entry] = piece_sum(sums[i], pieces); },
      [&](int entries, uint32_t blocks) -> int {
        table.sums = entries;
        return launch(table, blocks);
      });
}

}  // namespace deepcompile::kernels
