// SPDX-License-Identifier: Apache-2.0
#include "runtime/memory/param_store.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <c10/util/Exception.h>

#include <utility>

#include "base/error.h"

namespace deepcompile {
namespace {

// Sums are kept in f32, or wider if the wire is.
c10::ScalarType sum_dtype(c10::ScalarType reduce_dtype) {
  return reduce_dtype == c10::kDouble ? c10::kDouble : c10::kFloat;
}

int64_t bytes_of(const at::Tensor& tensor) {
  return tensor.defined() ? static_cast<int64_t>(tensor.nbytes()) : 0;
}

}  // namespace

ParamStore::ParamStore(Transport& transport, int64_t rank, int64_t world, c10::Device device,
                       c10::ScalarType reduce_dtype, int64_t accumulation)
    : transport_(transport),
      rows_(transport, rank, world),
      rank_(rank),
      world_(world),
      mean_(1.0 / static_cast<double>(world)),
      device_(device),
      reduce_dtype_(reduce_dtype),
      accumulation_(accumulation),
      totals_(device) {}

ParamState& ParamStore::add(const ParamSpec& spec) {
  if (find(spec.name) != nullptr) {
    throw UserError("[runtime] parameter " + spec.name + " was added before.");
  }
  for (const MemberSpec& member : spec.members) {
    if (members_.count(member.name) != 0) {
      throw UserError("[runtime] member " + member.name + " of parameter " + spec.name +
                      " belongs to parameter " + members_.at(member.name).first->name +
                      " already. Add each tensor once.");
    }
  }
  const ShardMemory memory = [this](const std::string& name, int64_t numel, bool in_place,
                                    c10::TensorOptions options) {
    return transport_.shard_memory(name, numel, in_place, options);
  };
  params_.push_back(std::make_unique<ParamState>(spec, rank_, world_, device_, memory));
  ParamState& param = *params_.back();
  by_name_.emplace(param.name, &param);
  for (size_t i = 0; i < param.members.size(); ++i) {
    members_.emplace(param.members[i].name, std::make_pair(&param, i));
  }
  if (param.trainable) {
    const auto item = static_cast<int64_t>(c10::elementSize(reduce_dtype_));
    transport_.expect_reduction(param.shard_numel() * item);
  }
  return param;
}

ParamState* ParamStore::find(std::string_view name) {
  const auto found = by_name_.find(name);
  return found == by_name_.end() ? nullptr : found->second;
}

ParamState& ParamStore::at(std::string_view name) {
  ParamState* param = find(name);
  if (param == nullptr) {
    throw UserError("[runtime] there is no parameter " + std::string(name) +
                    ". Add it with add_param first.");
  }
  return *param;
}

Member& ParamStore::member(const std::string& name) {
  const auto found = members_.find(name);
  if (found == members_.end()) {
    throw UserError("[runtime] no parameter has a member " + name + ".");
  }
  return found->second.first->members[found->second.second];
}

void ParamStore::gather(ParamState& param, std::shared_ptr<Span> span) {
  if (param.presence == Presence::kRows || param.coming) {
    throw UserError("[runtime] parameter " + param.name +
                    " is gathered whole while rows of it are there. Release it first.");
  }
  if (param.presence != Presence::kShard) return;
  param.allocate_full();
  param.gathering = transport_.gather(param.full, param.shard(), std::move(span));
  param.presence = Presence::kInFlight;
}

void ParamStore::gather_rows(ParamState& param, const std::shared_ptr<RowSet>& set,
                             const at::Tensor& numbers, std::shared_ptr<Span> span) {
  rows_.meet(set.get(), numbers);  // also for what is whole: the reduction wants the set
  if (param.presence != Presence::kShard) return;
  param.allocate_full();
  RowExchange::Gather gather = rows_.start_gather(param, *set, std::move(span));
  param.gathering = std::move(gather.transfer);
  param.coming = ComingRows{set, gather.rows};
  param.presence = Presence::kInFlight;
}

void ParamStore::wait(ParamState& param) {
  if (param.presence == Presence::kWhole) return param.bring_full_back();
  if (param.presence == Presence::kRows) return;
  if (param.presence == Presence::kShard) {
    throw UserError("[runtime] parameter " + param.name +
                    " is waited for, but no gather of it was started. Gather it first.");
  }
  try {
    param.gathering->wait();
    if (param.coming) rows_.place(param, *param.coming->set, param.coming->rows);
  } catch (const c10::OutOfMemoryError&) {
    throw;  // it is still under way, and can be waited for again
  } catch (...) {
    forget_gather(param);
    throw;
  }
  const bool rows = param.coming.has_value();
  forget_gather(param);
  param.bind_members();
  if (rows) param.presence = Presence::kRows;
}

void ParamStore::forget_gather(ParamState& param) {
  param.gathering.reset();
  param.coming.reset();
  param.presence = Presence::kShard;
}

void ParamStore::check_storage() const {
  for (const auto& param : params_) {
    for (const Member& member : param->members) member.slot.check_storage();
  }
}

void ParamStore::release(ParamState& param) {
  if (param.placement != Placement::kSharded) return;
  if (!param.full.defined() && !param.full_is_away()) return;
  if (param.presence == Presence::kInFlight) wait(param);
  param.drop_full();
}

void ParamStore::check_trainable(const ParamState& param) const {
  if (!param.trainable) {
    throw UserError("[runtime] parameter " + param.name + " is frozen, it has no gradient.");
  }
  if (param.early) {
    throw UserError("[runtime] parameter " + param.name +
                    " has a gradient after its update of this step. An update in the backward "
                    "wants each parameter reduced once a micro batch: plan with "
                    "place_optimizer at the step.");
  }
}

void ParamStore::add_locally(ParamState& param, const MemberGrads& grads) {
  check_trainable(param);
  const at::Tensor flat = param.flat_gradient(grads, sum_dtype(reduce_dtype_));
  if (param.local_sum.defined()) {
    param.local_sum.add_(flat);
  } else {
    // The sum is written to: it may not be the caller's own gradient.
    const bool own = grads.size() == 1 && flat.is_alias_of(grads.begin()->second);
    param.local_sum = own ? flat.clone() : flat;
  }
  for (const auto& grad : grads) param.local_members.push_back(grad.first);
}

at::Tensor ParamStore::reduction_source(ParamState& param, const MemberGrads& grads) const {
  at::Tensor& sum = param.local_sum;
  if (!sum.defined()) return param.flat_gradient(grads, reduce_dtype_);
  // Every allocation before the first change: it can be tried again if one fails.
  // For the same reason no caller may find no memory after this.
  const bool wide = sum.scalar_type() == reduce_dtype_;
  const at::Tensor source = wide ? sum : at::empty_like(sum, sum.options().dtype(reduce_dtype_));
  if (!grads.empty()) sum.add_(param.flat_gradient(grads, sum.scalar_type()));
  if (!wide) source.copy_(sum);
  return source;
}

void ParamStore::check_reducible(const ParamState& param) const {
  check_trainable(param);
  if (param.pending) {
    throw UserError("[runtime] parameter " + param.name +
                    " is reduced again before its last reduction was accumulated.");
  }
}

void ParamStore::reduce_rows(ParamState& param, std::shared_ptr<const RowSet> set,
                             const MemberGrads& grads, std::shared_ptr<Span> span) {
  check_reducible(param);
  DC_CHECK(set && set->numbers.defined(), "a backward reduces rows that its forward gathered");
  param.check_gradients(grads);
  PendingReduction pending;
  const at::Tensor gradient = grads.empty() ? at::Tensor() : grads.begin()->second;
  pending.source = rows_.rows_of(param, *set, gradient, reduce_dtype_);
  pending.value =
      at::empty({world_, pending.source.size(0), pending.source.size(1)}, pending.source.options());
  for (const auto& grad : grads) pending.members.push_back(grad.first);
  pending.transfer =
      transport_.gather(pending.value.view({-1}), pending.source.view({-1}), std::move(span));
  pending.rows = std::move(set);
  param.pending = std::move(pending);
}

void ParamStore::reduce(ParamState& param, const MemberGrads& grads, std::shared_ptr<Span> span) {
  check_reducible(param);
  PendingReduction pending;
  const bool replicated = param.placement == Placement::kReplicated;
  const c10::TensorOptions options = param.options().dtype(reduce_dtype_);
  if (replicated && world_ > 1) {
    pending.value = at::empty({param.padded_numel()}, options);
    pending.piece = pending.value.narrow(0, param.shard_range().start, param.shard_numel());
  } else if (world_ > 1) {
    pending.piece = pending.value = at::empty({param.shard_numel()}, options);
  }
  transport_.prepare_reduction(param.shard_numel() *
                               static_cast<int64_t>(c10::elementSize(reduce_dtype_)));
  pending.source = reduction_source(param, grads);
  pending.members = param.local_members;
  for (const auto& grad : grads) pending.members.push_back(grad.first);
  if (world_ == 1) pending.piece = pending.value = pending.source;
  pending.transfer = transport_.reduce_scatter(pending.piece, pending.source, std::move(span));
  const auto piece_bytes = static_cast<int64_t>(pending.piece.nbytes());
  if (replicated && world_ > 1 && transport_.in_order(piece_bytes)) {
    // The same sums as a sharded parameter's, bit by bit, then handed round.
    pending.broadcast = transport_.gather(pending.value, pending.piece, nullptr);
  }
  param.pending = std::move(pending);
  param.local_sum.reset();
  param.local_members.clear();
}

void ParamStore::end_reduction(ParamState& param, PendingReduction* pending, bool read_now) {
  const bool handed_round = param.placement == Placement::kReplicated && world_ > 1;
  if (pending->transfer) {
    if (read_now || handed_round) {
      pending->transfer->wait();
    } else {
      pending->transfer->wait_in_batch();
    }
  }
  if (handed_round) {
    if (!pending->broadcast) {
      pending->broadcast = transport_.gather(pending->value, pending->piece, nullptr);
    }
    pending->broadcast->wait();
  }
}

int64_t ParamStore::drop_reduced(ParamState& param) {
  if (world_ == 1 || !param.pending || !param.pending->transfer) return 0;
  try {
    param.pending->transfer->wait();
  } catch (const c10::OutOfMemoryError&) {
    return 0;  // the sum wants memory itself: something else has to go first
  }
  param.pending->transfer.reset();
  return bytes_of(std::exchange(param.pending->source, {}));  // gone if `accumulate` had it
}

void ParamStore::accumulate(ParamState& param) {
  if (!param.pending) {
    throw UserError("[runtime] parameter " + param.name +
                    " is accumulated, but no reduction of it was started.");
  }
  // In this order, so that it can be tried again after an allocation failed.
  if (!added_by_transfer(param)) {
    const bool read_now =
        param.pending->rows || !becomes_gradient(param);  // here, by a kernel of its own
    end_reduction(param, &*param.pending, read_now);
    param.pending->source.reset();
    if (param.pending->rows) {
      param.pending->value = rows_.sum(param, *param.pending->rows, param.pending->value);
      param.pending->rows.reset();
    }
    add_to_gradient(param, param.pending->value);
  }
  for (const size_t member : param.pending->members) param.members[member].has_grad = true;
  param.pending.reset();
}

// Whether P's sum is its gradient, without a copy.
bool ParamStore::becomes_gradient(const ParamState& param) const {
  return !param.gradient.defined() && accumulation_ == 1;
}

// Several micro-batches' sums go into P's gradient in the pass that makes them, if the
// transfer can; else it is over, and nothing was added.
bool ParamStore::added_by_transfer(ParamState& param) {
  PendingReduction& pending = *param.pending;
  const bool whole = param.placement == Placement::kReplicated && world_ > 1;
  if (!pending.transfer || whole || pending.rows || becomes_gradient(param)) return false;
  const RunningTotal total = running_total(param, pending.value);
  if (!pending.transfer->wait_adding(total)) {
    pending.transfer.reset();
    return false;
  }
  set_total(param, total.tensor);
  return true;
}

void ParamStore::set_total(ParamState& param, const at::Tensor& total) {
  param.gradient = total;
  param.grad_scale = 1.0;
  param.gradient_is_wire = false;
}

// P's gradient, made or converted if need be: where `sum` can be added.
RunningTotal ParamStore::running_total(ParamState& param, const at::Tensor& sum) const {
  const c10::ScalarType dtype = sum_dtype(reduce_dtype_);
  if (!param.gradient.defined()) {
    return {at::empty(sum.sizes(), sum.options().dtype(dtype)), mean_, /*first=*/true};
  }
  if (param.gradient_is_wire) {
    set_total(param, at::mul(param.gradient.to(dtype), param.grad_scale));
  }
  return {param.gradient, mean_};
}

void ParamStore::add_to_gradient(ParamState& param, const at::Tensor& sum) {
  if (becomes_gradient(param)) {
    // The mean is taken where the gradient is read, in f32.
    param.gradient = sum;
    param.grad_scale = mean_;
    param.gradient_is_wire = true;
    return;
  }
  if (totals_.in_library(1)) {
    const RunningTotal total = running_total(param, sum);
    totals_({PieceSum::Sum{{sum.const_data_ptr()}, sum.scalar_type(), {}, total}});
    return set_total(param, total.tensor);
  }
  const at::Tensor scaled = at::mul(sum.to(sum_dtype(reduce_dtype_)), mean_);
  if (!param.gradient.defined()) return set_total(param, scaled);
  running_total(param, sum).tensor.add_(scaled);
}

void ParamStore::zero_grad() {
  for (const auto& param : params_) param->drop_gradient();
}

void ParamStore::before_change(ParamState& param) {
  if (world_ == 1 || param.placement == Placement::kReplicated) return;
  if (param.presence == Presence::kInFlight) wait(param);
  transport_.before_write(param.shard());
}

void ParamStore::owned_changed(ParamState& param) {
  if (world_ == 1 || param.placement == Placement::kReplicated) return;
  if (param.presence == Presence::kInFlight) wait(param);
  if (param.full_is_away()) return param.drop_full();
  param.presence = Presence::kShard;
}

void ParamStore::abandon_transfers(bool reachable) {
  const auto end = [&](const auto& transfer) {
    try {
      if (reachable) transfer();
    } catch (const std::exception&) {
      reachable = false;  // the first failure is already on its way to the user
    }
  };
  for (const auto& param : params_) {
    if (param->presence == Presence::kInFlight) {
      end([&] { wait(*param); });
      if (param->presence == Presence::kInFlight) forget_gather(*param);
    }
    if (param->pending) {
      PendingReduction pending = std::move(*param->pending);
      param->pending.reset();
      end([&] { end_reduction(*param, &pending, /*read_now=*/true); });
    }
  }
}

void ParamStore::visit(const std::function<void(const at::Tensor&)>& visitor) const {
  for (const auto& param : params_) {
    visitor(param->shard_if_copied());
    visitor(param->full);
    visitor(param->full_place);
    visitor(param->master_if_copied());
    visitor(param->exp_avg_if_made());
    visitor(param->exp_avg_sq_if_made());
    visitor(param->gradient);
    visitor(param->local_sum);
    if (param->coming) visitor(param->coming->rows);
    if (param->due) visitor(param->due->gradient);
    if (!param->pending) continue;
    visitor(param->pending->source);
    visitor(param->pending->value);
  }
}

BufferReport ParamStore::buffer_report() const {
  BufferReport report{{"shards", 0}, {"full", 0},      {"masters", 0},
                      {"states", 0}, {"gradients", 0}, {"reductions", 0}};
  for (const auto& param : params_) {
    report["shards"] += bytes_of(param->shard_if_copied());
    const bool is_shard = world_ == 1 && param->placement == Placement::kSharded;
    const at::Tensor& full = param->full.defined() ? param->full : param->full_place;
    if (!is_shard) report["full"] += bytes_of(full);
    report["masters"] += bytes_of(param->master_if_copied());
    report["states"] += bytes_of(param->exp_avg_if_made()) + bytes_of(param->exp_avg_sq_if_made());
    report["gradients"] += bytes_of(param->gradient) + bytes_of(param->local_sum);
    if (param->due) report["gradients"] += bytes_of(param->due->gradient);
    if (param->pending) {
      report["reductions"] += bytes_of(param->pending->source) + bytes_of(param->pending->value);
    }
  }
  return report;
}

}  // namespace deepcompile
