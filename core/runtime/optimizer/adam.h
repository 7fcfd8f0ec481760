// SPDX-License-Identifier: Apache-2.0
// Adam and AdamW on one stretch of one parameter.
//
// All kernels are elementwise: an element's bits depend on its own inputs
// alone, so every way of cutting a parameter into shards gives the same bits.
// The CPU kernel and that of the CUDA library are one function
// (runtime/cuda/adamw_math.h), so they agree bit by bit; they compute what
// torch.optim's for-each loop does, in the same order (tests compare them).
// Without the library, and for f64, devices use torch's fused kernel.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <vector>

#include "runtime/cuda/library.h"
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
// device, or undefined for 1. May allocate.
void adam_torch(const AdamPiece& piece, const at::Tensor& factor);

// The same with the library's kernel, for pieces whose types `library_takes`, and of
// which each is good for `one_launch` with the next: on the current stream, without an
// allocation.
void adam_library(const KernelLibrary& library, const std::vector<AdamPiece>& pieces,
                  const at::Tensor& factor);
bool library_takes(const AdamPiece& piece);
bool one_launch(const AdamPiece& a, const AdamPiece& b);

// A gradient and its pending factor.
struct ScaledGradient {
  at::Tensor gradient;  // 1-D, contiguous, f32, f64, f16 or bf16; read only
  double grad_scale = 1.0;
};

// Sum of squares of grad_scale * gradient, in f64, over fixed blocks: the same
// bits for any number of threads.
double squared_sum_cpu(const at::Tensor& gradient, double grad_scale);
// Of all gradients together, as a 0-dim tensor on the device: in f32 by torch's
// kernels, in f64 by the library's, whose order is fixed too.
at::Tensor squared_sum_torch(const std::vector<ScaledGradient>& gradients, c10::Device device);
at::Tensor squared_sum_library(const KernelLibrary& library,
                               const std::vector<ScaledGradient>& gradients, c10::Device device);

}  // namespace deepcompile
