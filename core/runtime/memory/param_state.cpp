// SPDX-License-Identifier: Apache-2.0
#include "runtime/memory/param_state.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <vector>

#include "base/error.h"

namespace deepcompile {

ParamState::ParamState(const ParamSpec& spec, int64_t rank, int64_t world, c10::Device device,
                       const ShardMemory& memory)
    : name(spec.name),
      placement(spec.placement),
      trainable(spec.trainable),
      rank(rank),
      world(world),
      dtype_(spec.members.empty() ? c10::ScalarType::Undefined
                                  : spec.members.front().parameter.scalar_type()),
      device_(device),
      shard_numel_(deepcompile::shard_numel(spec.numel, world)) {
  check(spec);
  if (placement == Placement::kSharded) {
    shard_ = memory(name, shard_numel_, /*in_place=*/false, options());
    if (!shard_.defined()) shard_ = at::zeros({shard_numel_}, options());
    copy_values(spec, shard_, shard_range());
  } else {
    if (placement == Placement::kWhole) {
      full = memory(name, shard_numel_, /*in_place=*/true, options());
    }
    if (!full.defined()) full = at::zeros({padded_numel()}, options());
    copy_values(spec, full, {0, padded_numel()});
  }
  has_master_copy_ = trainable && dtype_ != master_dtype();
  if (has_master_copy_) master_copy_ = owned().to(master_dtype());
  for (const MemberSpec& member : spec.members) {
    const int64_t numel = member.parameter.numel();
    members.push_back(
        {member.name, member.offset, numel, MemberSlot(member.name, member.parameter, device), {}});
  }
  if (full.defined()) bind_members();
}

void ParamState::check(const ParamSpec& spec) const {
  const auto fail = [&](const std::string& why) {
    throw UserError("[runtime] parameter " + spec.name + ": " + why);
  };
  if (spec.members.empty()) fail("it has no members.");
  if (!c10::isFloatingType(dtype_)) {
    fail(std::string("its element type is ") + c10::toString(dtype_) +
         ". Only floating-point parameters can be sharded.");
  }
  int64_t end = 0;
  for (const MemberSpec& member : spec.members) {
    if (member.parameter.scalar_type() != dtype_) {
      fail("member " + member.name + " has another element type than " + spec.members.front().name +
           ". Pack members of one type.");
    }
    if (member.offset < end || member.offset + member.parameter.numel() > spec.numel) {
      fail("member " + member.name + " overlaps another or leaves the flat buffer of " +
           std::to_string(spec.numel) + " elements.");
    }
    if (member.parameter.numel() > 0 && member.parameter.storage().nbytes() == 0) {
      fail("member " + member.name + " has no memory: it belongs to another engine already.");
    }
    end = member.offset + member.parameter.numel();
  }
}

void ParamState::copy_values(const ParamSpec& spec, const at::Tensor& to, Range range) const {
  for (const MemberSpec& member : spec.members) {
    const int64_t start = std::max(member.offset, range.start);
    const int64_t stop = std::min(member.offset + member.parameter.numel(), range.stop);
    if (start >= stop) continue;
    const at::Tensor values = member.parameter.detach().reshape({-1});
    to.narrow(0, start - range.start, stop - start)
        .copy_(values.narrow(0, start - member.offset, stop - start));
  }
}

c10::TensorOptions ParamState::options() const {
  return c10::TensorOptions().dtype(dtype_).device(device_);
}

c10::ScalarType ParamState::master_dtype() const {
  return dtype_ == c10::kDouble ? c10::kDouble : c10::kFloat;
}

Range ParamState::owned_range() const {
  return placement == Placement::kReplicated ? Range{0, padded_numel()} : shard_range();
}

Range ParamState::owned_range(const Member& member) const {
  const Range owned = owned_range();
  const int64_t start = std::max(member.offset, owned.start);
  return {start, std::max(start, std::min(member.offset + member.numel, owned.stop))};
}

at::Tensor ParamState::shard() const {
  return shard_.defined() ? shard_ : full.narrow(0, shard_range().start, shard_numel_);
}

at::Tensor ParamState::owned() const {
  return placement == Placement::kReplicated ? full : shard();
}

at::Tensor ParamState::master() const {
  DC_CHECK(trainable, "frozen parameter " + name + " has no master copy");
  DC_CHECK(!has_master_copy_ || master_copy_.defined(), name + " has its master on the host");
  return master_copy_.defined() ? master_copy_ : owned();
}

at::Tensor ParamState::exp_avg() {
  if (!exp_avg_.defined()) exp_avg_ = at::zeros_like(master());
  return exp_avg_;
}

at::Tensor ParamState::exp_avg_sq() {
  if (!exp_avg_sq_.defined()) exp_avg_sq_ = at::zeros_like(master());
  return exp_avg_sq_;
}

bool ParamState::is_written() const {
  return std::any_of(members.begin(), members.end(),
                     [](const Member& member) { return member.slot.is_written(); });
}

void ParamState::forget_written() {
  for (Member& member : members) member.slot.forget_written();
}

void ParamState::allocate_full() {
  if (full.defined()) return;
  // One rank's shard is the whole buffer already.
  full = world == 1 ? shard_ : full_place;
  if (!full.defined()) full = at::empty({padded_numel()}, options());
}

void ParamState::bind_members() {
  for (Member& member : members) member.slot.bind(full, member.offset);
  presence = Presence::kWhole;
}

void ParamState::drop_full() {
  DC_CHECK(placement == Placement::kSharded, "parameter " + name + " lives in its full buffer");
  for (Member& member : members) member.slot.unbind();
  full.reset();
  away_.reset();
  presence = Presence::kShard;
}

int64_t ParamState::send_full_away() {
  const bool movable = placement == Placement::kSharded && world > 1 && !due;
  if (!movable || presence != Presence::kWhole || !full.defined()) return 0;
  const auto bytes = static_cast<int64_t>(full.nbytes());
  const at::Tensor values = full.to(c10::kCPU, /*non_blocking=*/false, /*copy=*/true);
  drop_full();
  presence = Presence::kWhole;
  away_ = values;
  return bytes;
}

void ParamState::bring_full_back() {
  if (!away_.defined()) return;
  allocate_full();
  full.copy_(away_);
  away_.reset();
  bind_members();
}

void ParamState::store_from_full() {
  if (shard_.defined() && world > 1) {
    shard_.copy_(full.narrow(0, shard_range().start, shard_numel_));
  }
  if (!master_copy_.defined()) return;
  // Where nothing was written, the master keeps what its rounding has lost.
  const at::Tensor now = owned();
  const at::Tensor same = master_copy_.to(now.scalar_type()).eq(now);
  master_copy_.copy_(at::where(same, master_copy_, now.to(master_copy_.scalar_type())));
}

void ParamState::store_from_master() {
  if (master_copy_.defined()) owned().copy_(master_copy_);
}

void ParamState::drop_gradient() {
  gradient.reset();
  grad_scale = 1.0;
  gradient_is_wire = false;
  reduced_eagerly = false;
  local_sum.reset();
  local_members.clear();
  for (Member& member : members) member.has_grad = false;
}

void ParamState::check_gradients(const MemberGrads& grads) const {
  for (const auto& [index, grad] : grads) {
    DC_CHECK(index < members.size(), "gradient of a member that " + name + " lacks");
    if (grad.layout() != c10::kStrided) {
      throw UserError("[runtime] the gradient of " + members[index].name +
                      " is sparse, which cannot be reduced. Build the embedding with "
                      "sparse=False.");
    }
    if (grad.numel() != members[index].numel || grad.device() != device_) {
      throw UserError("[runtime] the gradient of " + members[index].name + " has " +
                      std::to_string(grad.numel()) + " elements on " + grad.device().str() +
                      ", the parameter " + std::to_string(members[index].numel) + " on " +
                      device_.str() + ". Return a gradient of the parameter's shape.");
    }
  }
}

at::Tensor ParamState::flat_gradient(const MemberGrads& grads, c10::ScalarType reduce_dtype) const {
  check_gradients(grads);
  const bool covers = grads.size() == 1 && members.size() == 1 && members[0].offset == 0;
  if (covers) {
    const at::Tensor& grad = grads.begin()->second;
    if (grad.numel() == padded_numel() && grad.is_contiguous() &&
        grad.scalar_type() == reduce_dtype) {
      return grad.detach().view({-1});
    }
  }
  const c10::TensorOptions options = this->options().dtype(reduce_dtype);
  const at::Tensor flat =
      covers ? at::empty({padded_numel()}, options) : at::zeros({padded_numel()}, options);
  if (covers) flat.narrow(0, members[0].numel, padded_numel() - members[0].numel).zero_();
  // Neighbours without a gap between them are one copy.
  std::vector<at::Tensor> together;
  int64_t begin = 0, end = 0;
  const auto copy = [&] {
    if (together.empty()) return;
    at::Tensor to = flat.narrow(0, begin, end - begin);
    if (together.size() == 1) {
      to.copy_(together.front());
    } else {
      at::cat_out(to, together);
    }
    together.clear();
  };
  for (const auto& [index, grad] : grads) {
    const Member& member = members[index];
    if (member.offset != end) {
      copy();
      begin = member.offset;
    }
    together.push_back(grad.detach().reshape({-1}));
    end = member.offset + member.numel;
  }
  copy();
  return flat;
}

}  // namespace deepcompile
