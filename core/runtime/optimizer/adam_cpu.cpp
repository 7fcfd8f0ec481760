// SPDX-License-Identifier: Apache-2.0
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <array>

#include "base/error.h"
#include "runtime/cuda/adamw_math.h"
#include "runtime/optimizer/adam.h"

namespace deepcompile {
namespace {

constexpr int64_t kBlock = 1024;            // elements converted at a time; fits the L1 cache
constexpr int64_t kGrain = 16 * kBlock;     // elements a thread takes at least
constexpr int64_t kSumBlock = 16 * kBlock;  // elements of one partial sum of squares

// out[i] = in[i] * scale * factor, rounded after each product.
template <typename Real, typename In>
void scale_block(const void* data, int64_t begin, int64_t count, Real scale, Real factor,
                 Real* out) {
  const In* in = static_cast<const In*>(data) + begin;
  for (int64_t i = 0; i < count; ++i) {
    out[i] = static_cast<Real>(in[i]) * scale * factor;
  }
}

template <typename Real>
using ScaleBlock = void (*)(const void*, int64_t, int64_t, Real, Real, Real*);

template <typename Real>
ScaleBlock<Real> scale_block_for(c10::ScalarType dtype) {
  switch (dtype) {
    case c10::kFloat:
      return &scale_block<Real, float>;
    case c10::kDouble:
      return &scale_block<Real, double>;
    case c10::kHalf:
      return &scale_block<Real, c10::Half>;
    case c10::kBFloat16:
      return &scale_block<Real, c10::BFloat16>;
    default:
      break;
  }
  DC_CHECK(false, "gradients are f32, f64, f16 or bf16");
}

template <typename Real, typename Out>
void store_block(const Real* in, int64_t begin, int64_t count, void* data) {
  Out* out = static_cast<Out*>(data) + begin;
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<Out>(in[i]);
}

template <typename Real>
using StoreBlock = void (*)(const Real*, int64_t, int64_t, void*);

template <typename Real>
StoreBlock<Real> store_block_for(c10::ScalarType dtype) {
  switch (dtype) {
    case c10::kHalf:
      return &store_block<Real, c10::Half>;
    case c10::kBFloat16:
      return &store_block<Real, c10::BFloat16>;
    default:
      break;
  }
  DC_CHECK(false, "weights with a master copy are f16 or bf16");
}

template <typename Real>
void update_block(Real* master, Real* exp_avg, Real* exp_avg_sq, const Real* gradient,
                  int64_t count, const kernels::AdamFactors<Real>& factors) {
  for (int64_t i = 0; i < count; ++i) {
    kernels::adam_element(gradient[i], factors, &master[i], &exp_avg[i], &exp_avg_sq[i]);
  }
}

template <typename Real>
void adam_typed(const AdamPiece& piece, double factor) {
  const Hyper& hyper = piece.hyper;
  const auto factors = kernels::adam_factors<Real>(hyper.lr, hyper.beta1, hyper.beta2, hyper.eps,
                                                   hyper.weight_decay, hyper.decoupled, piece.step);
  const auto scale = scale_block_for<Real>(piece.gradient.scalar_type());
  const bool rounds = piece.weight.defined();
  const StoreBlock<Real> store =
      rounds ? store_block_for<Real>(piece.weight.scalar_type()) : nullptr;
  Real* master = piece.master.data_ptr<Real>();
  Real* exp_avg = piece.exp_avg.data_ptr<Real>();
  Real* exp_avg_sq = piece.exp_avg_sq.data_ptr<Real>();
  const void* gradient = piece.gradient.const_data_ptr();
  void* weight = rounds ? piece.weight.data_ptr() : nullptr;
  at::parallel_for(0, piece.master.numel(), kGrain, [&](int64_t begin, int64_t end) {
    std::array<Real, kBlock> scaled;
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t count = std::min(kBlock, end - at);
      scale(gradient, at, count, static_cast<Real>(piece.grad_scale), static_cast<Real>(factor),
            scaled.data());
      update_block(master + at, exp_avg + at, exp_avg_sq + at, scaled.data(), count, factors);
      if (rounds) store(master + at, at, count, weight);
    }
  });
}

}  // namespace

void adam_cpu(const AdamPiece& piece, double factor) {
  if (piece.master.scalar_type() == c10::kDouble) {
    adam_typed<double>(piece, factor);
  } else {
    adam_typed<float>(piece, factor);
  }
}

double squared_sum_cpu(const at::Tensor& gradient, double grad_scale) {
  const int64_t numel = gradient.numel();
  const auto scale = scale_block_for<double>(gradient.scalar_type());
  const void* data = gradient.const_data_ptr();
  const int64_t blocks = (numel + kSumBlock - 1) / kSumBlock;
  std::vector<double> sums(static_cast<size_t>(blocks), 0.0);
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    std::array<double, kBlock> scaled;
    for (int64_t block = begin; block < end; ++block) {
      double sum = 0.0;
      const int64_t stop = std::min(numel, (block + 1) * kSumBlock);
      for (int64_t at = block * kSumBlock; at < stop; at += kBlock) {
        const int64_t count = std::min(kBlock, stop - at);
        scale(data, at, count, grad_scale, 1.0, scaled.data());
        for (int64_t i = 0; i < count; ++i) sum += scaled[i] * scaled[i];
      }
      sums[static_cast<size_t>(block)] = sum;
    }
  });
  double total = 0.0;
  for (const double sum : sums) total += sum;
  return total;
}

}  // namespace deepcompile
