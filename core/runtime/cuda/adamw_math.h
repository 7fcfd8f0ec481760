// SPDX-License-Identifier: Apache-2.0
// The arithmetic of Adam and AdamW on one element, for CPUs and GPUs alike.
//
// Every operation is rounded by itself, never fused with the next: an element's
// bits depend on its own inputs alone, on a CPU and on a GPU they are the same,
// and so every way of cutting a parameter into shards gives the same bits. On a
// CPU that takes -ffp-contract=off, as the build has it.
#pragma once

#include <cmath>
#include <cstdint>

#include "runtime/cuda/numbers.h"

namespace deepcompile::kernels {

#if defined(__CUDA_ARCH__)
DC_HOST_DEVICE float add(float a, float b) {
  return __fadd_rn(a, b);
}
DC_HOST_DEVICE float subtract(float a, float b) {
  return __fsub_rn(a, b);
}
DC_HOST_DEVICE float multiply(float a, float b) {
  return __fmul_rn(a, b);
}
DC_HOST_DEVICE float divide(float a, float b) {
  return __fdiv_rn(a, b);
}
DC_HOST_DEVICE float root(float a) {
  return __fsqrt_rn(a);
}
#else
template <typename Real>
DC_HOST_DEVICE Real add(Real a, Real b) {
  return a + b;
}
template <typename Real>
DC_HOST_DEVICE Real subtract(Real a, Real b) {
  return a - b;
}
template <typename Real>
DC_HOST_DEVICE Real multiply(Real a, Real b) {
  return a * b;
}
template <typename Real>
DC_HOST_DEVICE Real divide(Real a, Real b) {
  return a / b;
}
template <typename Real>
DC_HOST_DEVICE Real root(Real a) {
  return std::sqrt(a);
}
#endif

// What one update's settings come to.
template <typename Real>
struct AdamFactors {
  Real keep;       // of the master: 1 - lr * weight decay if decoupled, else 1
  Real l2;         // of the master that is added to the gradient: 0 if decoupled
  Real new1;       // 1 - beta1
  Real old2;       // beta2
  Real new2;       // 1 - beta2
  Real step_size;  // -lr / (1 - beta1^step)
  Real root2;      // sqrt(1 - beta2^step)
  Real eps;
};

// In f64, as torch's Python computes them, then rounded. step: this update's number, from 1.
template <typename Real>
AdamFactors<Real> adam_factors(double lr, double beta1, double beta2, double eps,
                               double weight_decay, bool decoupled, int64_t step) {
  const double correction1 = 1.0 - std::pow(beta1, static_cast<double>(step));
  const double correction2 = 1.0 - std::pow(beta2, static_cast<double>(step));
  AdamFactors<Real> factors;
  factors.keep = static_cast<Real>(decoupled ? 1.0 - lr * weight_decay : 1.0);
  factors.l2 = static_cast<Real>(decoupled ? 0.0 : weight_decay);
  factors.new1 = static_cast<Real>(1.0 - beta1);
  factors.old2 = static_cast<Real>(beta2);
  factors.new2 = static_cast<Real>(1.0 - beta2);
  factors.step_size = static_cast<Real>(-(lr / correction1));
  factors.root2 = static_cast<Real>(std::sqrt(correction2));
  factors.eps = static_cast<Real>(eps);
  return factors;
}

// gradient: with all its factors applied. The operations and their order are
// those of torch.optim's for-each loop.
template <typename Real>
DC_HOST_DEVICE void adam_element(Real gradient, const AdamFactors<Real>& factors, Real* master,
                                 Real* exp_avg, Real* exp_avg_sq) {
  const Real old = *master;
  const Real g = add(gradient, multiply(factors.l2, old));
  const Real m = add(*exp_avg, multiply(factors.new1, subtract(g, *exp_avg)));
  const Real v = add(multiply(*exp_avg_sq, factors.old2), multiply(multiply(factors.new2, g), g));
  const Real scale = add(divide(root(v), factors.root2), factors.eps);
  *exp_avg = m;
  *exp_avg_sq = v;
  *master = add(multiply(old, factors.keep), multiply(factors.step_size, divide(m, scale)));
}

}  // namespace deepcompile::kernels
