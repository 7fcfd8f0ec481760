// SPDX-License-Identifier: Apache-2.0
// Sums of equally long arrays, element by element: the last step of reductions
// whose pieces lie in this GPU's memory. A sum is written, or added to the total of
// several micro-batches, in the same pass. What one thread does; without CUDA, so that tests run
// it on a CPU.
#pragma once

#include <cstdint>
#include <type_traits>

#include "runtime/cuda/numbers.h"
#include "runtime/cuda/piece_sum_table.h"

namespace deepcompile::kernels {

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

constexpr int kPieceGroups = 2;  // packs of each piece that a thread has under way

// Writes neighbouring sums, which are rounded to T.
template <typename T>
struct SumsOut {
  using Element = T;
  static constexpr int kWide = kSixteen<Element>;
  struct Before {};  // what has to be read of `out`
  DC_HOST_DEVICE Before read(const T*) const { return {}; }
  DC_HOST_DEVICE void put(const Wide<T> (&sums)[kWide], const Before&, T* out) const {
    Pack<T, kWide> rounded;
    for (int k = 0; k < kWide; ++k) narrow(sums[k], &rounded.at[k]);
    store_pack(rounded, out);
  }
  DC_HOST_DEVICE void put(Wide<T> sum, T* out) const { narrow(sum, out); }
};

// Adds them to totals, which are read before the pieces are waited for: otherwise a thread would
// wait twice. kFirst: there are none yet; known to the compiler, which puts off a read that only
// may happen.
template <typename T, bool kFirst>
struct TotalsOut {
  using Element = Wide<T>;
  static constexpr int kWide = kSixteen<Element>;
  using Before = Pack<Element, kWide>;
  Element scale;
  DC_HOST_DEVICE Element scaled(Element sum) const {
    T rounded;
    narrow(sum, &rounded);
    return wide(rounded) * scale;
  }
  DC_HOST_DEVICE Before read(const Element* out) const {
    if constexpr (kFirst) {
      return {};
    } else {
      return load_pack<kWide>(out);
    }
  }
  DC_HOST_DEVICE void put(const Element (&sums)[kWide], const Before& before, Element* out) const {
    Before total;
    for (int k = 0; k < kWide; ++k) {
      const Element more = scaled(sums[k]);
      total.at[k] = kFirst ? more : before.at[k] + more;
    }
    store_pack(total, out);
  }
  DC_HOST_DEVICE void put(Element sum, Element* out) const {
    *out = kFirst ? scaled(sum) : *out + scaled(sum);
  }
};

// Thread `thread` of a sum's block `block`; kCount: how many pieces, 0 for `pieces`. Out:
// SumsOut or TotalsOut.
template <typename T, int kCount, typename Out>
DC_HOST_DEVICE void piece_sum_thread(const PieceSum& table, const Out& to, int pieces,
                                     uint32_t block, int thread) {
  constexpr int kWide = Out::kWide;
  constexpr int kStride = kPieceThreads * kWide;
  constexpr int kChunk = kPieceGroups * kStride;
  const int64_t begin = static_cast<int64_t>(block) * kChunk;
  const int64_t left = table.numel - begin;
  const int count = kCount > 0 ? kCount : pieces;
  auto* const out = static_cast<typename Out::Element*>(table.out) + begin;
  if (table.aligned && left >= kChunk) {
    typename Out::Before before[kPieceGroups];
    for (int g = 0; g < kPieceGroups; ++g) {
      before[g] = to.read(out + g * kStride + kWide * thread);
    }
    Wide<T> sums[kPieceGroups][kWide] = {};
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int p = 0; p < count; ++p) {
      const T* const from = static_cast<const T*>(table.piece[p]) + begin + kWide * thread;
      Pack<T, kWide> loaded[kPieceGroups];
      for (int g = 0; g < kPieceGroups; ++g) loaded[g] = load_pack<kWide>(from + g * kStride);
      for (int g = 0; g < kPieceGroups; ++g) {
        for (int k = 0; k < kWide; ++k) {
          const auto value = wide(loaded[g].at[k]);
          sums[g][k] = p == 0 ? value : sums[g][k] + value;
        }
      }
    }
    for (int g = 0; g < kPieceGroups; ++g) {
      to.put(sums[g], before[g], out + g * kStride + kWide * thread);
    }
    return;
  }
  const int here = left < kChunk ? static_cast<int>(left) : kChunk;
  for (int i = thread; i < here; i += kPieceThreads) {
    auto sum = wide(static_cast<const T*>(table.piece[0])[begin + i]);
    for (int p = 1; p < count; ++p) sum += wide(static_cast<const T*>(table.piece[p])[begin + i]);
    to.put(sum, out + i);
  }
}

template <typename T, bool kTotals>  // elements of a block
constexpr int kPieceChunk =
    kPieceThreads* kPieceGroups* kSixteen<std::conditional_t<kTotals, Wide<T>, T>>;

// Thread `thread` of a launch's block `block`.
template <typename T, int kCount, bool kTotals>
DC_HOST_DEVICE void piece_sum_of_table(const PieceTable& table, uint32_t block, int thread) {
  const int s = entry_of(table.first_block, table.sums, block);
  const PieceSum& sum = table.sum[s];
  const uint32_t of_sum = block - table.first_block[s];
  [[maybe_unused]] const auto scale = static_cast<Wide<T>>(table.scale);
  if constexpr (!kTotals) {
    piece_sum_thread<T, kCount>(sum, SumsOut<T>(), table.count, of_sum, thread);
  } else if (sum.first) {
    piece_sum_thread<T, kCount>(sum, TotalsOut<T, true>{scale}, table.count, of_sum, thread);
  } else {
    piece_sum_thread<T, kCount>(sum, TotalsOut<T, false>{scale}, table.count, of_sum, thread);
  }
}

}  // namespace deepcompile::kernels
