// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/_fused_adam.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mul.h>

#include "runtime/optimizer/adam.h"

namespace deepcompile {

void adam_device(const AdamPiece& piece, const at::Tensor& factor) {
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

}  // namespace deepcompile
