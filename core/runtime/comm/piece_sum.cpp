// SPDX-License-Identifier: Apache-2.0
#include "runtime/comm/piece_sum.h"

#include <ATen/ops/add.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>

#include "base/error.h"
#include "runtime/cuda/launch.h"

namespace deepcompile {
namespace {

deepcompile_cuda_sum row_of(const std::vector<const void*>& pieces, const at::Tensor& out) {
  deepcompile_cuda_sum row = {};
  std::copy(pieces.begin(), pieces.end(), row.pieces);
  row.out = out.data_ptr();
  row.numel = out.numel();
  return row;
}

}  // namespace

void PieceSum::operator()(const std::vector<Sum>& sums) {
  if (sums.empty()) return;
  DC_CHECK(sums.front().pieces.size() > 1, "a sum has at least two pieces");
  if (in_library(static_cast<int64_t>(sums.front().pieces.size()))) return launch(sums);
  for (const Sum& sum : sums) add(sum);
}

bool PieceSum::in_library(int64_t pieces) {
  return pieces <= DEEPCOMPILE_CUDA_MAX_PIECES && library() != nullptr;
}

bool PieceSum::allocates(int64_t pieces) {
  return pieces > 2 && !in_library(pieces);
}

bool PieceSum::takes_totals(int64_t pieces) {
  return in_library(pieces);
}

void PieceSum::operator()(const std::vector<Added>& sums) {
  std::vector<deepcompile_cuda_sum> table;
  for (size_t first = 0; first < sums.size(); first += table.size()) {
    const Added& like = sums[first];
    table.clear();
    for (size_t i = first; i < sums.size(); ++i) {
      const Added& sum = sums[i];
      if (sum.type != like.type || sum.to.scale != like.to.scale) break;
      deepcompile_cuda_sum& row = table.emplace_back(row_of(sum.pieces, sum.to.tensor));
      row.first = sum.to.first ? 1 : 0;
    }
    const int status = library()->piece_totals(device_.index(), current_cuda_stream(device_),
                                               table.data(), static_cast<int64_t>(table.size()),
                                               static_cast<int64_t>(like.pieces.size()),
                                               cuda_type(like.type), like.to.scale);
    check_launch(*library(), status, "piece total");
  }
}

void PieceSum::launch(const std::vector<Sum>& sums) {
  std::vector<deepcompile_cuda_sum> table;
  for (size_t first = 0; first < sums.size(); first += table.size()) {
    const at::Tensor& like = sums[first].out;
    table.clear();
    for (size_t i = first; i < sums.size(); ++i) {
      const Sum& sum = sums[i];
      if (sum.out.scalar_type() != like.scalar_type()) break;
      table.push_back(row_of(sum.pieces, sum.out));
    }
    const int status = library()->piece_sums(device_.index(), current_cuda_stream(device_),
                                             table.data(), static_cast<int64_t>(table.size()),
                                             static_cast<int64_t>(sums.front().pieces.size()),
                                             cuda_type(like.scalar_type()));
    check_launch(*library(), status, "piece sum");
  }
}

void PieceSum::add(const Sum& sum) const {
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
