// SPDX-License-Identifier: Apache-2.0
#include "runtime/comm/piece_sum.h"

#include <ATen/ops/add.h>

#include "base/error.h"
#include "runtime/cuda/launch.h"

namespace deepcompile {

void PieceSum::operator()(const std::vector<at::Tensor>& pieces, const at::Tensor& out) {
  DC_CHECK(pieces.size() > 1, "a sum has at least two pieces");
  if (pieces.size() <= DEEPCOMPILE_CUDA_MAX_PIECES && library() != nullptr) {
    std::vector<const void*> pointers;
    for (const at::Tensor& piece : pieces) pointers.push_back(piece.const_data_ptr());
    const int status =
        library()->piece_sum(out.device().index(), current_cuda_stream(out.device()),
                             pointers.data(), static_cast<int64_t>(pointers.size()), out.data_ptr(),
                             out.numel(), cuda_type(out.scalar_type()));
    return check_launch(*library(), status, "piece sum");
  }
  at::Tensor to = out;
  if (pieces.size() == 2) {  // torch adds 16-bit types in f32
    at::add_out(to, pieces[0], pieces[1]);
    return;
  }
  const bool small = out.element_size() < 4;
  const at::Tensor sum = small ? pieces[0].to(c10::kFloat) : out;
  if (!small) sum.copy_(pieces[0]);
  for (size_t i = 1; i < pieces.size(); ++i) sum.add_(pieces[i]);
  if (small) to.copy_(sum);
}

const KernelLibrary* PieceSum::library() {
  if (!asked_ && device_.is_cuda()) {
    library_ = choose_kernels(KernelLibrary::beside_runtime(), device_.index()).library;
  }
  asked_ = true;
  return library_;
}

}  // namespace deepcompile
