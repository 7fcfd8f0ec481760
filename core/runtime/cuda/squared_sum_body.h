// SPDX-License-Identifier: Apache-2.0
// The sum of squares in two stages, in an order that types and sizes alone fix:
// a block adds up one chunk of one gradient, then one block adds up the partial
// sums. What one thread does, and the tables; without CUDA, so that tests run it
// on a CPU.
#pragma once

#include <cmath>
#include <cstdint>

#include "runtime/cuda/kernels.h"
#include "runtime/cuda/launch_table.h"
#include "runtime/cuda/numbers.h"

namespace deepcompile::kernels {

using GradientArgument = deepcompile_cuda_gradient;

constexpr int kSumThreads = 512;     // of a block of the first stage
constexpr int kSumLoads = 4;         // of 16 bytes, that a thread has under way
constexpr int kSumChunk = 32768;     // elements of such a block
constexpr int kSumGradients = 112;   // of one launch
constexpr int kTotalThreads = 1024;  // of the second stage's block

struct SumTable {
  GradientArgument gradient[kSumGradients];
  uint32_t first_block[kSumGradients + 1];
  int32_t gradients;
  double* partials;  // of this launch's blocks
};
static_assert(sizeof(SumTable) <= kMaxTable, "too many gradients");

DC_HOST_DEVICE double to_f64(double value) {
  return value;
}
template <typename T>
DC_HOST_DEVICE double to_f64(T value) {
  return static_cast<double>(to_f32(value));
}

// Thread `thread`'s sum of squares over its block's chunk, not scaled. Which
// elements, and in which order, is the same for aligned arrays and others.
template <typename T>
DC_HOST_DEVICE double squared_sum_thread(const T* chunk, int count, int thread) {
  constexpr int kWide = kSixteen<T>;
  constexpr int kStride = kWide * kSumThreads;
  double sums[kWide] = {};
  const auto add = [&](const Pack<T, kWide>& pack) {
    for (int k = 0; k < kWide; ++k) {
      const double value = to_f64(pack.at[k]);
      sums[k] = std::fma(value, value, sums[k]);
    }
  };
  int at = kWide * thread;
  if (reinterpret_cast<uintptr_t>(chunk) % 16 == 0) {
    for (; at + (kSumLoads - 1) * kStride + kWide <= count; at += kSumLoads * kStride) {
      Pack<T, kWide> loaded[kSumLoads];
      for (int i = 0; i < kSumLoads; ++i) loaded[i] = load_pack<kWide>(chunk + at + i * kStride);
      for (int i = 0; i < kSumLoads; ++i) add(loaded[i]);
    }
    for (; at + kWide <= count; at += kStride) add(load_pack<kWide>(chunk + at));
  }
  for (; at < count; at += kStride) {
    for (int k = 0; k < kWide; ++k) {
      const double value = at + k < count ? to_f64(chunk[at + k]) : 0.0;
      sums[k] = std::fma(value, value, sums[k]);
    }
  }
  for (int half = kWide / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
  }
  return sums[0];
}

// The same for block `block`, counted in its gradient.
DC_HOST_DEVICE double squared_sum_thread(const GradientArgument& gradient, uint32_t block,
                                         int thread) {
  const int64_t begin = static_cast<int64_t>(block) * kSumChunk;
  const int64_t left = gradient.numel - begin;
  const int count = left < kSumChunk ? static_cast<int>(left) : kSumChunk;
  switch (gradient.type) {
    case DEEPCOMPILE_CUDA_BF16:
      return squared_sum_thread(static_cast<const Bf16*>(gradient.data) + begin, count, thread);
    case DEEPCOMPILE_CUDA_F16:
      return squared_sum_thread(static_cast<const F16*>(gradient.data) + begin, count, thread);
    case DEEPCOMPILE_CUDA_F64:
      return squared_sum_thread(static_cast<const double*>(gradient.data) + begin, count, thread);
    default:
      return squared_sum_thread(static_cast<const float*>(gradient.data) + begin, count, thread);
  }
}

// The second stage's thread: its share of the partial sums.
DC_HOST_DEVICE double total_thread(const double* partials, int64_t count, int thread) {
  double sums[4] = {};
  int64_t at = thread;
  for (; at + 3 * kTotalThreads < count; at += 4 * kTotalThreads) {
    for (int k = 0; k < 4; ++k) sums[k] += partials[at + k * kTotalThreads];
  }
  for (int k = 0; k < 3; ++k) {
    if (at + k * kTotalThreads < count) sums[k] += partials[at + k * kTotalThreads];
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

inline int64_t sum_blocks(const GradientArgument& gradient) {
  return (gradient.numel + kSumChunk - 1) / kSumChunk;
}

// 0, or a deepcompile_cuda_refusal.
inline int check_gradients(const GradientArgument* gradients, int64_t count) {
  if (count < 0 || (count > 0 && gradients == nullptr)) return DEEPCOMPILE_CUDA_BAD_POINTER;
  for (int64_t i = 0; i < count; ++i) {
    const GradientArgument& gradient = gradients[i];
    const int64_t bytes = type_bytes(gradient.type);
    if (bytes == 0) return DEEPCOMPILE_CUDA_BAD_TYPE;
    if (gradient.numel < 0) return DEEPCOMPILE_CUDA_BAD_NUMEL;
    if (gradient.numel > 0 && !usable_pointer(gradient.data, bytes)) {
      return DEEPCOMPILE_CUDA_BAD_POINTER;
    }
    if (gradient.numel / kSumChunk >= kMaxBlocks) return DEEPCOMPILE_CUDA_BAD_NUMEL;
  }
  return 0;
}

// Calls launch(table, blocks) -> int for as few tables as hold all gradients; ends
// with the first that is not 0. The gradients were checked.
template <typename Launch>
int for_each_sum_table(const GradientArgument* gradients, int64_t count, double* partials,
                       Launch&& launch) {
  SumTable table = {};
  table.partials = partials;
  return for_each_launch(
      count, kSumGradients, table.first_block, [&](int64_t i) { return sum_blocks(gradients[i]); },
      [&](int64_t i, int entry) { table.gradient[entry] = gradients[i]; },
      [&](int entries, uint32_t blocks) -> int {
        table.gradients = entries;
        const int status = launch(table, blocks);
        table.partials += blocks;
        return status;
      });
}

}  // namespace deepcompile::kernels
