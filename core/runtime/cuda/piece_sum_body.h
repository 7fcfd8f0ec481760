// SPDX-License-Identifier: Apache-2.0
// The sum of equally long arrays, element by element: the last step of a
// reduction whose pieces lie in this GPU's memory. What one thread does; without
// CUDA, so that tests run it on a CPU.
#pragma once

#include <cstdint>

#include "runtime/cuda/kernels.h"
#include "runtime/cuda/launch_table.h"
#include "runtime/cuda/numbers.h"

namespace deepcompile::kernels {

constexpr int kPieceThreads = 512;  // of a block
constexpr int kPieceGroups = 4;     // of 16 bytes, that a thread loads at once
constexpr int kMaxPieces = DEEPCOMPILE_CUDA_MAX_PIECES;

struct PieceTable {
  const void* piece[kMaxPieces];
  void* out;
  int64_t numel;
  int32_t count;
  bool aligned;  // all of them, to 16 bytes
};

DC_HOST_DEVICE double wide(double value) {
  return value;
}
template <typename T>
DC_HOST_DEVICE float wide(T value) {
  return to_f32(value);
}
DC_HOST_DEVICE void narrow(double value, double* out) {
  *out = value;
}
DC_HOST_DEVICE void narrow(float value, float* out) {
  *out = value;
}
template <typename T>
DC_HOST_DEVICE void narrow(float value, T* out) {
  round_to(value, out);
}

template <typename T>  // elements of a block
constexpr int kPieceChunk = kPieceThreads* kPieceGroups* SixteenBytes<T>::kCount;

// Thread `thread` of block `block`; kCount: how many pieces, 0 for table.count.
template <typename T, int kCount>
DC_HOST_DEVICE void piece_sum_thread(const PieceTable& table, uint32_t block, int thread) {
  constexpr int kWide = SixteenBytes<T>::kCount;
  constexpr int kStride = kPieceThreads * kWide;
  const int64_t begin = static_cast<int64_t>(block) * kPieceChunk<T>;
  const int64_t left = table.numel - begin;
  const int count = kCount > 0 ? kCount : table.count;
  T* const out = static_cast<T*>(table.out) + begin;
  if (table.aligned && left >= kPieceChunk<T>) {
    decltype(wide(T())) sums[kPieceGroups][kWide] = {};
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int p = 0; p < count; ++p) {
      const T* const from = static_cast<const T*>(table.piece[p]) + begin + kWide * thread;
      SixteenBytes<T> loaded[kPieceGroups];
      for (int g = 0; g < kPieceGroups; ++g) loaded[g] = load_sixteen(from + g * kStride);
      for (int g = 0; g < kPieceGroups; ++g) {
        for (int k = 0; k < kWide; ++k) {
          const auto value = wide(loaded[g].at[k]);
          sums[g][k] = p == 0 ? value : sums[g][k] + value;
        }
      }
    }
    for (int g = 0; g < kPieceGroups; ++g) {
      SixteenBytes<T> rounded;
      for (int k = 0; k < kWide; ++k) narrow(sums[g][k], &rounded.at[k]);
      store_sixteen(rounded, out + g * kStride + kWide * thread);
    }
    return;
  }
  const int here = left < kPieceChunk<T> ? static_cast<int>(left) : kPieceChunk<T>;
  for (int i = thread; i < here; i += kPieceThreads) {
    auto sum = wide(static_cast<const T*>(table.piece[0])[begin + i]);
    for (int p = 1; p < count; ++p) sum += wide(static_cast<const T*>(table.piece[p])[begin + i]);
    narrow(sum, out + i);
  }
}

// Fills the table. 0, or a deepcompile_cuda_refusal.
inline int make_piece_table(const void* const* pieces, int64_t count, void* out, int64_t numel,
                            int type, PieceTable* table) {
  const int64_t bytes = type_bytes(type);
  if (bytes == 0) return DEEPCOMPILE_CUDA_BAD_TYPE;
  if (count < 1 || count > kMaxPieces || pieces == nullptr) return DEEPCOMPILE_CUDA_BAD_POINTER;
  if (numel < 0 || numel / kPieceThreads >= kMaxBlocks) return DEEPCOMPILE_CUDA_BAD_NUMEL;
  table->out = out;
  table->numel = numel;
  table->count = static_cast<int32_t>(count);
  table->aligned = usable_pointer(out, 16);
  if (numel > 0 && !usable_pointer(out, bytes)) return DEEPCOMPILE_CUDA_BAD_POINTER;
  for (int64_t p = 0; p < count; ++p) {
    if (numel > 0 && !usable_pointer(pieces[p], bytes)) return DEEPCOMPILE_CUDA_BAD_POINTER;
    table->piece[p] = pieces[p];
    table->aligned = table->aligned && usable_pointer(pieces[p], 16);
  }
  return 0;
}

}  // namespace deepcompile::kernels
