// SPDX-License-Identifier: Apache-2.0
// Sums of equally long arrays, element by element: the last step of reductions
// whose pieces lie in this GPU's memory. A sum is written, or added to the total of
// several micro-batches, in the same pass. What one thread does; without CUDA, so that tests run
// it on a CPU.
#pragma once

#include <cstdint>

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

// Writes neighbouring sums, which are rounded to T.
template <typename T>
struct SumsOut {
  using Element = T;
  static constexpr int kGroups = 4;  // of 16 bytes of each piece, that a thread has under way
  template <int kWide>
  struct Before {};  // what has to be read of `out`
  template <int kWide>
  DC_HOST_DEVICE Before<kWide> read(const T*) const {
    return {};
  }
  template <int kWide>
  DC_HOST_DEVICE void put(const Wide<T> (&sums)[kWide], const Before<kWide>&, T* out) const {
    SixteenBytes<T> rounded;
    for (int k = 0; k < kWide; ++k) narrow(sums[k], &rounded.at[k]);
    store_sixteen(rounded, out);
  }
  DC_HOST_DEVICE void put(Wide<T> sum, T* out) const { narrow(sum, out); }
};

// Adds them to totals, which are read before the pieces are waited for: otherwise a thread would
// wait twice. They take as many registers as the sums, so there are fewer groups.
template <typename T>
struct TotalsOut {
  using Element = Wide<T>;
  static constexpr int kGroups = 2;
  static constexpr int kSixteen = SixteenBytes<Element>::kCount;
  template <int kWide>
  struct Before {
    SixteenBytes<Element> total[kWide / kSixteen];
  };
  Element scale;
  bool first;
  DC_HOST_DEVICE Element scaled(Element sum) const {
    T rounded;
    narrow(sum, &rounded);
    return wide(rounded) * scale;
  }
  template <int kWide>
  DC_HOST_DEVICE Before<kWide> read(const Element* out) const {
    Before<kWide> before = {};
    if (first) return before;
    for (int i = 0; i < kWide / kSixteen; ++i) before.total[i] = load_sixteen(out + i * kSixteen);
    return before;
  }
  template <int kWide>
  DC_HOST_DEVICE void put(const Element (&sums)[kWide], const Before<kWide>& before,
                          Element* out) const {
    for (int i = 0; i < kWide / kSixteen; ++i) {
      SixteenBytes<Element> total = before.total[i];
      for (int k = 0; k < kSixteen; ++k) {
        const Element more = scaled(sums[i * kSixteen + k]);
        total.at[k] = first ? more : total.at[k] + more;
      }
      store_sixteen(total, out + i * kSixteen);
    }
  }
  DC_HOST_DEVICE void put(Element sum, Element* out) const {
    *out = first ? scaled(sum) : *out + scaled(sum);
  }
};

template <typename T, typename Out>  // elements of a block
constexpr int kPieceChunk = kPieceThreads* Out::kGroups* SixteenBytes<T>::kCount;

// Thread `thread` of a sum's block `block`; kCount: how many pieces, 0 for `pieces`. Out:
// SumsOut or TotalsOut.
template <typename T, int kCount, typename Out>
DC_HOST_DEVICE void piece_sum_thread(const PieceSum& table, const Out& to, int pieces,
                                     uint32_t block, int thread) {
  constexpr int kWide = SixteenBytes<T>::kCount;
  constexpr int kStride = kPieceThreads * kWide;
  constexpr int kChunk = kPieceChunk<T, Out>;
  constexpr int kGroups = Out::kGroups;
  const int64_t begin = static_cast<int64_t>(block) * kChunk;
  const int64_t left = table.numel - begin;
  const int count = kCount > 0 ? kCount : pieces;
  auto* const out = static_cast<typename Out::Element*>(table.out) + begin;
  if (table.aligned && left >= kChunk) {
    typename Out::template Before<kWide> before[kGroups];
    for (int g = 0; g < kGroups; ++g) {
      before[g] = to.template read<kWide>(out + g * kStride + kWide * thread);
    }
    Wide<T> sums[kGroups][kWide] = {};
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int p = 0; p < count; ++p) {
      const T* const from = static_cast<const T*>(table.piece[p]) + begin + kWide * thread;
      SixteenBytes<T> loaded[kGroups];
      for (int g = 0; g < kGroups; ++g) loaded[g] = load_sixteen(from + g * kStride);
      for (int g = 0; g < kGroups; ++g) {
        for (int k = 0; k < kWide; ++k) {
          const auto value = wide(loaded[g].at[k]);
          sums[g][k] = p == 0 ? value : sums[g][k] + value;
        }
      }
    }
    for (int g = 0; g < kGroups; ++g) {
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

}  // namespace deepcompile::kernels
