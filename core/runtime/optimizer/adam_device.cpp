// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/_fused_adam.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "base/error.h"
#include "runtime/cuda/launch.h"
#include "runtime/optimizer/adam.h"

namespace deepcompile {
namespace {

deepcompile_cuda_adamw_segment segment_of(const AdamPiece& piece) {
  const Hyper& hyper = piece.hyper;
  deepcompile_cuda_adamw_segment segment = {};
  segment.master = piece.master.data_ptr<float>();
  segment.exp_avg = piece.exp_avg.data_ptr<float>();
  segment.exp_avg_sq = piece.exp_avg_sq.data_ptr<float>();
  segment.gradient = piece.gradient.const_data_ptr();
  segment.weight = piece.weight.defined() ? piece.weight.data_ptr() : nullptr;
  segment.numel = piece.master.numel();
  segment.grad_scale = piece.grad_scale;
  segment.lr = hyper.lr;
  segment.beta1 = hyper.beta1;
  segment.beta2 = hyper.beta2;
  segment.eps = hyper.eps;
  segment.weight_decay = hyper.weight_decay;
  segment.step = piece.step;
  segment.decoupled = hyper.decoupled ? 1 : 0;
  return segment;
}

int weight_type(const AdamPiece& piece) {
  return piece.weight.defined() ? cuda_type(piece.weight.scalar_type()) : DEEPCOMPILE_CUDA_NONE;
}

}  // namespace

void adam_torch(const AdamPiece& piece, const at::Tensor& factor) {
  // The fused kernel wants gradients of the master's type, and may not change
  // these: they can be the caller's own tensors.
  at::Tensor gradient = piece.gradient.to(piece.master.scalar_type());
  if (piece.grad_scale != 1.0) gradient = at::mul(gradient, piece.grad_scale);
  if (factor.defined()) gradient = at::mul(gradient, factor);
  const at::Tensor step =
      at::full({}, static_cast<double>(piece.step), piece.master.options().dtype(c10::kFloat));
  const Hyper& hyper = piece.hyper;
  const at::TensorList masters(piece.master), grads(gradient), averages(piece.exp_avg),
      squares(piece.exp_avg_sq), steps(step);
  if (hyper.decoupled) {
    at::_fused_adamw_(masters, grads, averages, squares, {}, steps, hyper.lr, hyper.beta1,
                      hyper.beta2, hyper.weight_decay, hyper.eps, /*amsgrad=*/false,
                      /*maximize=*/false);
  } else {
    at::_fused_adam_(masters, grads, averages, squares, {}, steps, hyper.lr, hyper.beta1,
                     hyper.beta2, hyper.weight_decay, hyper.eps, /*amsgrad=*/false,
                     /*maximize=*/false);
  }
  if (piece.weight.defined()) piece.weight.copy_(piece.master);
}

bool library_takes(const AdamPiece& piece) {
  return piece.master.scalar_type() == c10::kFloat && piece.gradient.scalar_type() != c10::kDouble;
}

bool one_launch(const AdamPiece& a, const AdamPiece& b) {
  return weight_type(a) == weight_type(b) && a.gradient.scalar_type() == b.gradient.scalar_type();
}

void adam_library(const KernelLibrary& library, const std::vector<AdamPiece>& pieces,
                  const at::Tensor& factor) {
  if (pieces.empty()) return;
  std::vector<deepcompile_cuda_adamw_segment> segments;
  segments.reserve(pieces.size());
  for (const AdamPiece& piece : pieces) {
    DC_CHECK(library_takes(piece) && one_launch(piece, pieces.front()),
             "pieces of one launch have one type");
    segments.push_back(segment_of(piece));
  }
  const c10::Device device = pieces.front().master.device();
  const int status = library.adamw(
      device.index(), current_cuda_stream(device), segments.data(),
      static_cast<int64_t>(segments.size()), cuda_type(pieces.front().gradient.scalar_type()),
      weight_type(pieces.front()), factor.defined() ? factor.const_data_ptr<float>() : nullptr);
  check_launch(library, status, "AdamW");
}

at::Tensor squared_sum_torch(const std::vector<ScaledGradient>& gradients, c10::Device device) {
  std::vector<at::Tensor> norms{
      at::zeros({}, c10::TensorOptions().dtype(c10::kFloat).device(device))};
  for (const ScaledGradient& scaled : gradients) {
    norms.push_back(
        at::linalg_vector_norm(scaled.gradient, 2, {}, false, c10::kFloat).mul(scaled.grad_scale));
  }
  return at::stack(norms).square().sum();
}

at::Tensor squared_sum_library(const KernelLibrary& library,
                               const std::vector<ScaledGradient>& gradients, c10::Device device) {
  std::vector<deepcompile_cuda_gradient> parts;
  parts.reserve(gradients.size());
  for (const ScaledGradient& scaled : gradients) {
    DC_CHECK(scaled.gradient.is_contiguous(), "gradients are flat");
    deepcompile_cuda_gradient part = {};
    part.data = scaled.gradient.const_data_ptr();
    part.numel = scaled.gradient.numel();
    part.scale = scaled.grad_scale;
    part.type = cuda_type(scaled.gradient.scalar_type());
    parts.push_back(part);
  }
  const auto count = static_cast<int64_t>(parts.size());
  const int64_t needed = library.squared_sum_partials(parts.data(), count);
  const c10::TensorOptions options = c10::TensorOptions().dtype(c10::kDouble).device(device);
  const at::Tensor partials = at::empty({needed}, options), sum = at::empty({}, options);
  const int status =
      library.squared_sum(sum.device().index(), current_cuda_stream(sum.device()), parts.data(),
                          count, needed > 0 ? partials.data_ptr<double>() : nullptr, needed,
                          sum.data_ptr(), DEEPCOMPILE_CUDA_F64);
  check_launch(library, status, "gradient norm");
  return sum;
}

}  // namespace deepcompile
