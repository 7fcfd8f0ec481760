// SPDX-License-Identifier: Apache-2.0
// Adam and AdamW on one stretch of one parameter.
//
// Both kernels are elementwise: an element's bits depend on its own inputs
// alone, so every way of cutting a parameter into shards gives the same bits.
// The CPU kernel computes what torch.optim's for-each loop does, in the same
// order (tests compare them); the device kernel is torch's fused one.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "runtime/hyper.h"

namespace deepcompile {

// All 1-D, contiguous and of the same size. f64 weights have f64 masters.
struct AdamPiece {
  at::Tensor master;        // f32 or f64
  at::Tensor exp_avg;       // of the master's type
  at::Tensor exp_avg_sq;    // of the master's type
  at::Tensor gradient;      // f32, f64, f16 or bf16; read only
  at::Tensor weight;        // gets the new master, rounded; undefined if it is the master
  double grad_scale = 1.0;  // the gradient's pending factor (the mean over ranks)
  int64_t step = 1;         // this update's number, from 1
  Hyper hyper;
};

// factor: one more factor on every gradient (clipping, loss scale).
void adam_cpu(const AdamPiece& piece, double factor);

// The same with torch's fused kernel; `factor` is a 0-dim f32 tensor on the
// device, or undefined for 1.
void adam_device(const AdamPiece& piece, const at::Tensor& factor);

// Sum of squares of grad_scale * gradient, in f64, over fixed blocks: the same
// bits for any number of threads.
double squared_sum_cpu(const at::Tensor& gradient, double grad_scale);

}  // namespace deepcompile
