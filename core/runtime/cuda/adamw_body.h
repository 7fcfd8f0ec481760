// SPDX-License-Identifier: Apache-2.0
// What one thread of the AdamW kernel does, and how elements are dealt to
// blocks and threads; without CUDA, so that tests run it on a CPU.
//
// A segment is cut into chunks, one a block. A thread works on groups of four
// neighbours; where the arrays' addresses do not agree modulo four elements, and
// before the first and after the last whole group, on single elements.
#pragma once

#include <cstdint>

#include "runtime/cuda/adamw_math.h"
#include "runtime/cuda/launch_table.h"
#include "runtime/cuda/numbers.h"

namespace deepcompile::kernels {

constexpr int kAdamThreads = 512;
constexpr int kAdamChunk = 8192;     // elements of a block
constexpr int kAdamSegments = 42;    // of one launch
constexpr int kSingleElements = -1;  // AdamSegment::head where no groups are possible

struct AdamSegment {
  float* master;
  float* exp_avg;
  float* exp_avg_sq;
  const void* gradient;
  void* weight;
  int64_t numel;
  AdamFactors<float> factors;
  float grad_scale;
  int32_t head;  // elements before the first group, 0 to 3; or kSingleElements
};

// The parameter of one launch.
struct AdamTable {
  AdamSegment segment[kAdamSegments];
  uint32_t first_block[kAdamSegments + 1];
  int32_t segments;
  const float* factor;  // null: 1
};
static_assert(sizeof(AdamTable) <= kMaxTable, "too many segments");

// Four elements on their way through a thread.
template <typename Grad, typename Weight>
struct AdamFour {
  Pack<Grad, 4> gradient;
  Pack<float, 4> master, exp_avg, exp_avg_sq;

  DC_HOST_DEVICE void update(const AdamFactors<float>& factors, float grad_scale, float factor,
                             Pack<Weight, 4>* weight) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int k = 0; k < 4; ++k) {
      const float scaled = multiply(multiply(to_f32(gradient.at[k]), grad_scale), factor);
      adam_element(scaled, factors, &master.at[k], &exp_avg.at[k], &exp_avg_sq.at[k]);
      if constexpr (sizeof(Weight) == 2) round_to(master.at[k], &weight->at[k]);
    }
  }
};

// One block's arrays, from its first element on.
template <typename Grad, typename Weight>
struct AdamChunk {
  float* master;
  float* exp_avg;
  float* exp_avg_sq;
  const Grad* gradient;
  Weight* weight;

  DC_HOST_DEVICE AdamFour<Grad, Weight> load(int at) const {
    return {load_pack<4>(gradient + at), load_pack<4>(master + at), load_pack<4>(exp_avg + at),
            load_pack<4>(exp_avg_sq + at)};
  }
  DC_HOST_DEVICE void store(int at, const AdamFour<Grad, Weight>& four,
                            const Pack<Weight, 4>& rounded) const {
    store_pack(four.master, master + at);
    store_pack(four.exp_avg, exp_avg + at);
    store_pack(four.exp_avg_sq, exp_avg_sq + at);
    if constexpr (sizeof(Weight) == 2) store_pack(rounded, weight + at);
  }
  // Elements at, at + kAdamThreads, ...: four, or as many as there are before `end`.
  DC_HOST_DEVICE void singles(int at, int end, const AdamFactors<float>& factors, float grad_scale,
                              float factor) const {
    AdamFour<Grad, Weight> four = {};
    Pack<Weight, 4> rounded = {};
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int k = 0; k < 4; ++k) {
      const int i = at + k * kAdamThreads;
      if (i >= end) continue;
      four.gradient.at[k] = gradient[i];
      four.master.at[k] = master[i];
      four.exp_avg.at[k] = exp_avg[i];
      four.exp_avg_sq.at[k] = exp_avg_sq[i];
    }
    four.update(factors, grad_scale, factor, &rounded);
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int k = 0; k < 4; ++k) {
      const int i = at + k * kAdamThreads;
      if (i >= end) continue;
      master[i] = four.master.at[k];
      exp_avg[i] = four.exp_avg.at[k];
      exp_avg_sq[i] = four.exp_avg_sq.at[k];
      if constexpr (sizeof(Weight) == 2) weight[i] = rounded.at[k];
    }
  }
};

// What thread `thread` of block `block`, counted in its segment, does.
template <typename Grad, typename Weight>
DC_HOST_DEVICE void adamw_thread(const AdamSegment& segment, float factor, uint32_t block,
                                 int thread) {
  const bool groups = segment.head != kSingleElements;
  const int64_t begin = static_cast<int64_t>(block) * kAdamChunk + (groups ? segment.head : 0);
  const int64_t left = segment.numel - begin;
  const int count = left < kAdamChunk ? static_cast<int>(left) : kAdamChunk;
  const int grouped = groups ? count / 4 * 4 : 0;
  AdamChunk<Grad, Weight> chunk = {segment.master + begin, segment.exp_avg + begin,
                                   segment.exp_avg_sq + begin,
                                   static_cast<const Grad*>(segment.gradient) + begin, nullptr};
  if constexpr (sizeof(Weight) == 2) chunk.weight = static_cast<Weight*>(segment.weight) + begin;
  const AdamFactors<float> factors = segment.factors;
  const float grad_scale = segment.grad_scale;
  constexpr int kRound = 4 * kAdamThreads;
  for (int at = 4 * thread; at < grouped; at += kRound) {
    AdamFour<Grad, Weight> four = chunk.load(at);
    Pack<Weight, 4> rounded;
    four.update(factors, grad_scale, factor, &rounded);
    chunk.store(at, four, rounded);
  }
  for (int i = grouped + thread; i < count; i += kRound) {
    chunk.singles(i, count, factors, grad_scale, factor);
  }
  if (groups && block == 0 && thread < segment.head) {  // what is before the first group
    chunk.singles(thread - segment.head, 0, factors, grad_scale, factor);
  }
}

}  // namespace deepcompile::kernels
