// SPDX-License-Identifier: Apache-2.0
#include "runtime/comm/piece_sum.h"

#include <ATen/ops/add.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>

#include "base/error.h"
#include "runtime/cuda/launch.h"

namespace deepcompile {
namespace {

deepcompile_cuda_sum row_of(const PieceSum::Sum& sum) {
  deepcompile_cuda_sum row = {};
  std::copy(sum.pieces.begin(), sum.pieces.end(), row.pieces);
  const at::Tensor& out = sum.total ? sum.total->tensor : sum.out;
  row.out = out.data_ptr();
  row.numel = out.numel();
  row.first = sum.total && sum.total->first ? 1 : 0;
  return row;
}

bool one_launch(const PieceSum::Sum& a, const PieceSum::Sum& b) {
  if (a.type != b.type || a.total.has_value() != b.total.has_value()) return false;
  return !a.total || a.total->scale == b.total->scale;
}

}  // namespace

void PieceSum::operator()(const std::vector<Sum>& sums) {
  if (sums.empty()) return;
  const bool enough = sums.front().pieces.size() > 1 || sums.front().total;
  DC_CHECK(enough, "a sum has at least two pieces");
  if (in_library(static_cast<int64_t>(sums.front().pieces.size()))) return launch(sums);
  for (const Sum& sum : sums) add(sum);
}

bool PieceSum::in_library(int64_t pieces) {
  return pieces <= DEEPCOMPILE_CUDA_MAX_PIECES && library() != nullptr;
}

bool PieceSum::allocates(int64_t pieces) {
  return pieces > 2 && !in_library(pieces);
}

void PieceSum::launch(const std::vector<Sum>& sums) {
  const c10::DeviceIndex device = device_.index();
  void* const stream = current_cuda_stream(device_);
  const auto pieces = static_cast<int64_t>(sums.front().pieces.size());
  std::vector<deepcompile_cuda_sum> table;
  for (size_t first = 0; first < sums.size(); first += table.size()) {
    const Sum& like = sums[first];
    table.clear();
    for (size_t i = first; i < sums.size() && one_launch(like, sums[i]); ++i) {
      table.push_back(row_of(sums[i]));
    }
    const auto count = static_cast<int64_t>(table.size());
    const int type = cuda_type(like.type);
    const int status =
        like.total ? library()->piece_totals(device, stream, table.data(), count, pieces, type,
                                             like.total->scale)
                   : library()->piece_sums(device, stream, table.data(), count, pieces, type);
    check_launch(*library(), status, "piece sum");
  }
}

void PieceSum::add(const Sum& sum) const {
  DC_CHECK(!sum.total, "only the library adds to totals");
  at::Tensor out = sum.out;
  std::vector<at::Tensor> pieces;
  for (const void* piece : sum.pieces) {
    pieces.push_back(at::from_blob(
        const_cast<void*>(piece), {out.numel()}, {1}, [](void*) {}, out.options(), device_));
  }
  if (pieces.size() == 2) {  // torch adds 16-bit types in f32
    at::add_out(out, pieces[0], pieces[1]);
    return;
  }
  const bool small = out.element_size() < 4;
  const at::Tensor total = small ? pieces[0].to(c10::kFloat) : out;
  if (!small) total.copy_(pieces[0]);
  for (size_t i = 1; i < pieces.size(); ++i) total.add_(pieces[i]);
  if (small) out.copy_(total);
}

const KernelLibrary* PieceSum::library() {
  if (!asked_ && device_.is_cuda()) {
    library_ = choose_kernels(KernelLibrary::beside_runtime(), device_.index()).library;
  }
  asked_ = true;
  return library_;
}

}  // namespace deepcompile
