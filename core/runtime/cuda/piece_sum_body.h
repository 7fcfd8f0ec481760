// SPDX-License-Identifier: Apache-2.0
// Sums of equally long arrays, element by element: the last step of reductions
// whose pieces lie in this GPU's memory. A sum is written, or added to the total of
// several micro-batches, in the same pass. What one thread does, and the parameters
// of launches; without CUDA, so that tests run it on a CPU.
#pragma once

#include <cstdint>

#include "runtime/cuda/kernels.h"
#include "runtime/cuda/launch_table.h"
#include "runtime/cuda/numbers.h"

namespace deepcompile::kernels {

constexpr int kPieceThreads = 512;  // of a block
constexpr int kPieceGroups = 4;     // of 16 bytes, that a thread loads at once
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

template <typename T>  // what is added up; a total's elements
using Wide = decltype(wide(T()));

template <typename T>  // elements of a block
constexpr int kPieceChunk = kPieceThreads* kPieceGroups* SixteenBytes<T>::kCount;

// Writes neighbouring sums, which are rounded to T.
template <typename T>
struct SumsOut {
  using Element = T;
  template <int kWide>
  DC_HOST_DEVICE void put(const Wide<T> (&sums)[kWide], T* out) const {
    SixteenBytes<T> rounded;
    for (int k = 0; k < kWide; ++k) narrow(sums[k], &rounded.at[k]);
    store_sixteen(rounded, out);
  }
  DC_HOST_DEVICE void put(Wide<T> sum, T* out) const { narrow(sum, out); }
};

// Adds them to totals.
template <typename T>
struct TotalsOut {
  using Element = Wide<T>;
  Element scale;
  bool first;
  DC_HOST_DEVICE Element scaled(Element sum) const {
    T rounded;
    narrow(sum, &rounded);
    return wide(rounded) * scale;
  }
  template <int kWide>
  DC_HOST_DEVICE void put(const Element (&sums)[kWide], Element* out) const {
    constexpr int kGroup = SixteenBytes<Element>::kCount;
    for (int k = 0; k < kWide; k += kGroup) {
      SixteenBytes<Element> total = {};
      if (!first) total = load_sixteen(out + k);
      for (int i = 0; i < kGroup; ++i) {
        const Element more = scaled(sums[k + i]);
        total.at[i] = first ? more : total.at[i] + more;
      }
      store_sixteen(total, out + k);
    }
  }
  DC_HOST_DEVICE void put(Element sum, Element* out) const {
    *out = first ? scaled(sum) : *out + scaled(sum);
  }
};

// Thread `thread` of a sum's block `block`; kCount: how many pieces, 0 for `pieces`. Out:
// SumsOut or TotalsOut.
template <typename T, int kCount, typename Out>
DC_HOST_DEVICE void piece_sum_thread(const PieceSum& table, const Out& to, int pieces,
                                     uint32_t block, int thread) {
  constexpr int kWide = SixteenBytes<T>::kCount;
  constexpr int kStride = kPieceThreads * kWide;
  const int64_t begin = static_cast<int64_t>(block) * kPieceChunk<T>;
  const int64_t left = table.numel - begin;
  const int count = kCount > 0 ? kCount : pieces;
  auto* const out = static_cast<typename Out::Element*>(table.out) + begin;
  if (table.aligned && left >= kPieceChunk<T>) {
    Wide<T> sums[kPieceGroups][kWide] = {};
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
    for (int g = 0; g < kPieceGroups; ++g) to.put(sums[g], out + g * kStride + kWide * thread);
    return;
  }
  const int here = left < kPieceChunk<T> ? static_cast<int>(left) : kPieceChunk<T>;
  for (int i = thread; i < here; i += kPieceThreads) {
    auto sum = wide(static_cast<const T*>(table.piece[0])[begin + i]);
    for (int p = 1; p < count; ++p) sum += wide(static_cast<const T*>(table.piece[p])[begin + i]);
    to.put(sum, out + i);
  }
}

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
