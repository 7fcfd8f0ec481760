// SPDX-License-Identifier: Apache-2.0
// The sums of reductions' pieces, once all lie in this rank's memory, and the totals of
// several sums.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <optional>
#include <vector>

#include "runtime/comm/transport.h"
#include "runtime/cuda/library.h"

namespace deepcompile {

class PieceSum {
 public:
  struct Sum {
    std::vector<const void*> pieces;  // at least two, of out.numel() elements of `type`
    c10::ScalarType type;
    at::Tensor out;  // of that type, 1-D and contiguous; none of the pieces
    // Where in_library: the rounded sum is added to it instead, and one piece will do.
    std::optional<RunningTotal> total = {};
  };

  explicit PieceSum(c10::Device device) : device_(device) {}

  // Each out = its pieces' sum in their order, in f32 (f64 for f64), rounded once: the
  // same bits by any kernel. On the current stream, where the kernel library serves the
  // device in one launch for all sums of one type; as many pieces each.
  void operator()(const std::vector<Sum>& sums);
  // Whether it does so for sums of so many pieces.
  bool in_library(int64_t pieces);
  // Whether sums of so many pieces take memory.
  bool allocates(int64_t pieces);

 private:
  const KernelLibrary* library();
  void launch(const std::vector<Sum>& sums);
  void add(const Sum& sum) const;

  c10::Device device_;
  bool asked_ = false;
  const KernelLibrary* library_ = nullptr;
};

}  // namespace deepcompile
