// SPDX-License-Identifier: Apache-2.0
// The sum of a reduction's pieces, once all lie in this rank's memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <vector>

#include "runtime/cuda/library.h"

namespace deepcompile {

class PieceSum {
 public:
  explicit PieceSum(c10::Device device) : device_(device) {}

  // out = the pieces' sum in their order, in f32 (f64 for f64), rounded once: the
  // same bits by any kernel. 1-D and contiguous, of one type and size; `out` is
  // none of them. On the current stream. May allocate without the kernel library
  // if there are more than two.
  void operator()(const std::vector<at::Tensor>& pieces, const at::Tensor& out);

 private:
  const KernelLibrary* library();

  c10::Device device_;
  bool asked_ = false;
  const KernelLibrary* library_ = nullptr;
};

}  // namespace deepcompile
