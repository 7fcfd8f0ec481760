// SPDX-License-Identifier: Apache-2.0
#include "runtime/optimizer/sharded_adam.h"

#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/error.h"

namespace deepcompile {
namespace {

// As torch.nn.utils.clip_grad_norm_ has it.
constexpr double kClipEps = 1e-6;
// Updates of a batch: as many as one launch takes.
constexpr size_t kMostNoted = 42;

// This rank's piece of the gradient: the same elements for every placement.
at::Tensor gradient_piece(const ParamState& param) {
  if (param.placement != Placement::kReplicated) return param.gradient;
  return param.gradient.narrow(0, param.shard_range().start, param.shard_numel());
}

bool same(const Hyper& x, const Hyper& y) {
  return x.lr == y.lr && x.beta1 == y.beta1 && x.beta2 == y.beta2 && x.eps == y.eps &&
         x.weight_decay == y.weight_decay && x.decoupled == y.decoupled;
}

bool same_update(const ParamState& param, size_t a, size_t b) {
  const DueUpdate& due = *param.due;
  return due.outstanding[a] == due.outstanding[b] &&
         param.members[a].step == param.members[b].step && same(due.hypers[a], due.hypers[b]);
}

}  // namespace

ShardedAdam::ShardedAdam(ParamStore& store, StateMover& states, Transport& transport,
                         c10::Device device, double clip)
    : store_(store), states_(states), transport_(transport), device_(device), clip_(clip) {}

void ShardedAdam::check(const StepOptions& options) const {
  for (const auto& param : store_.params()) {
    if (!param->pending) continue;
    throw UserError("[runtime] parameter " + param->name +
                    " has a reduction that was not accumulated. Accumulate it before the step.");
  }
  check_early(options);
}

void ShardedAdam::begin(const StepOptions& options) {
  options_ = options;
  result_ = {};
  factor_ = options.loss_scale_inv;
  factor_tensor_.reset();
  if (!device_.is_cpu() && factor_ != 1.0) {
    factor_tensor_ = at::full({}, factor_, c10::TensorOptions().dtype(c10::kFloat).device(device_));
  }
  if (members_may_differ) agree_on_members();
  if (options.check_finite) result_.skipped = !std::isfinite(squared_sum().item<double>());
}

bool ShardedAdam::early() const {
  return std::any_of(store_.params().begin(), store_.params().end(),
                     [](const auto& param) { return param->early.has_value(); });
}

void ShardedAdam::check_early(const StepOptions& options) const {
  for (const auto& param : store_.params()) {
    if (!param->early) continue;
    const std::string where = "[runtime] parameter " + param->name +
                              " was updated in the backward of this step's last micro batch";
    if (options.check_finite || options.loss_scale_inv != 1.0) {
      throw UserError(where +
                      ", and the step scales the loss or may be skipped, which early updates "
                      "forbid. Plan with place_optimizer at the step.");
    }
    for (size_t i = 0; i < param->members.size(); ++i) {
      if (same(param->members[i].hyper, (*param->early)[i])) continue;
      throw UserError(where + ", and the settings of " + param->members[i].name +
                      " were changed since, which early updates forbid. Change them before the "
                      "last micro batch, or plan with place_optimizer at the step.");
    }
  }
}

void ShardedAdam::agree_on_members() {
  members_may_differ = false;
  std::vector<float> flags;
  for (const auto& param : store_.params()) {
    for (const Member& member : param->members) flags.push_back(member.has_grad ? 1.0f : 0.0f);
  }
  const at::Tensor shared = at::tensor(flags).to(device_);
  transport_.all_reduce(shared, Reduction::kMax);
  const at::Tensor host = shared.cpu();
  const float* flag = host.const_data_ptr<float>();
  for (const auto& param : store_.params()) {
    for (Member& member : param->members) member.has_grad = *flag++ != 0.0f;
  }
}

const at::Tensor& ShardedAdam::squared_sum() {
  // A second try, after an allocation failed, goes on with the ranks' sum; so does a norm after
  // the check of what is finite.
  if (!squared_sum_.defined()) {
    const at::Tensor sum = squared_sum_here();
    transport_.all_reduce(sum, Reduction::kSum);
    squared_sum_ = sum;
  }
  return squared_sum_;
}

void ShardedAdam::norm() {
  if (early()) {
    throw UserError(
        "[runtime] the gradient norm comes after updates in the backward, which "
        "clipping forbids. Plan with place_optimizer at the step.");
  }
  const at::Tensor norm = squared_sum().sqrt().mul(options_.loss_scale_inv);
  if (device_.is_cpu()) {
    result_.norm = norm.item<double>();
    const double clip = clip_ / (*result_.norm + kClipEps);
    if (clip_ > 0.0 && !(clip >= 1.0)) factor_ *= clip;  // NaN too, as on a GPU
  } else {
    result_.norm_tensor = norm.to(c10::kFloat);
    if (clip_ > 0.0) {
      const at::Tensor clip =
          result_.norm_tensor.add(kClipEps).reciprocal().mul(clip_).clamp_max(1.0);
      factor_tensor_ = clip.mul(options_.loss_scale_inv);
    }
  }
  squared_sum_.reset();
}

at::Tensor ShardedAdam::squared_sum_here() {
  std::vector<ScaledGradient> gradients;
  for (const auto& param : store_.params()) {
    if (param->gradient.defined()) gradients.push_back({gradient_piece(*param), param->grad_scale});
  }
  if (device_.is_cpu()) {
    const at::Tensor sum = at::zeros({}, c10::TensorOptions().dtype(c10::kDouble));
    double* total = sum.data_ptr<double>();
    for (const auto& [gradient, scale] : gradients) *total += squared_sum_cpu(gradient, scale);
    return sum;
  }
  return library() ? squared_sum_library(*library(), gradients, device_)
                   : squared_sum_torch(gradients, device_);
}

void ShardedAdam::make_due(ParamState& param, double factor, const at::Tensor& factor_tensor) {
  DueUpdate due{.gradient = param.gradient,
                .grad_scale = param.grad_scale,
                .factor = factor,
                .factor_tensor = factor_tensor,
                .hypers = {},
                .outstanding = {}};
  for (const Member& member : param.members) {
    due.hypers.push_back(member.hyper);
    due.outstanding.push_back(member.has_grad);
  }
  param.due = std::move(due);
  param.drop_gradient();
}

void ShardedAdam::update(ParamState& param) {
  defer(param);
  apply(param);
}

void ShardedAdam::defer(ParamState& param) {
  // Nothing is due already: `begin` applied it, or this is a second try.
  if (!param.gradient.defined() || param.due) return;
  if (result_.skipped) return param.drop_gradient();
  make_due(param, factor_, factor_tensor_);
}

void ShardedAdam::store(ParamState& param) {
  param.bring_full_back();  // memory relief may have sent it to the host since
  states_.need(param);
  store_.before_change(param);
  param.store_from_full();
  param.forget_written();
}

void ShardedAdam::take_written(ParamState& param) {
  if (!param.is_written()) return;
  if (param.due) {
    param.forget_written();  // it is said once
    throw UserError("[runtime] parameter " + param.name +
                    " was written to between steps while its update is due, which the plan leaves "
                    "to the next forward. Write to it inside GatheredParameters with a "
                    "modifier_rank, which brings it up to date first.");
  }
  const bool copied = param.trainable && param.dtype() != param.master_dtype();
  if (copied && param.placement != Placement::kSharded) return store(param);
  param.forget_written();
}

void ShardedAdam::update_early(ParamState& param) {
  if (!param.due) take_written(param);
  const bool complete = param.gradient.defined() && !param.pending && !param.reduced_eagerly;
  if (complete && !param.due) {
    make_due(param, 1.0, {});
    param.early = param.due->hypers;
  }
  apply(param);
}

void ShardedAdam::apply(ParamState& param) {
  if (!param.due) return;
  take_written(param);
  store_.before_change(param);
  DueUpdate& due = *param.due;
  // Neighbours with equal settings are one stretch; the gaps between them hold
  // zeros, with zero gradients.
  std::vector<Run> runs;
  for (size_t first = 0; first < param.members.size();) {
    size_t last = first + 1;
    while (last < param.members.size() && same_update(param, first, last)) ++last;
    if (due.outstanding[first]) runs.push_back(run_of(param, first, last));
    first = last;
  }
  update_runs(param, runs);
  const bool changed = due.changed;
  param.due.reset();
  if (changed) store_.owned_changed(param);
}

ShardedAdam::Run ShardedAdam::run_of(ParamState& param, size_t first, size_t last) {
  const DueUpdate& due = *param.due;
  const Range owned = param.owned_range();
  const int64_t begin = std::max(param.members[first].offset, owned.start);
  const int64_t end =
      std::min(param.members[last - 1].offset + param.members[last - 1].numel, owned.stop);
  Run run{.first = first, .last = last, .piece = {}};
  if (begin >= end) return run;
  if (batch_ && states_.missing_bytes(param) > 0) launch();  // gives memory back first
  states_.need(param);
  const auto piece_of = [&](const at::Tensor& tensor) {
    const bool all =
        end - begin == tensor.numel();  // the usual case: no view, which costs the host
    return all ? tensor : tensor.narrow(0, begin - owned.start, end - begin);
  };
  run.piece = AdamPiece{.master = piece_of(param.master()),
                        .exp_avg = piece_of(param.exp_avg()),
                        .exp_avg_sq = piece_of(param.exp_avg_sq()),
                        .gradient = piece_of(due.gradient),
                        .weight = {},
                        .grad_scale = due.grad_scale,
                        .step = param.members[first].step + 1,
                        .hyper = due.hypers[first]};
  if (param.master_if_copied().defined()) run.piece->weight = piece_of(param.owned());
  return run;
}

void ShardedAdam::update_runs(ParamState& param, const std::vector<Run>& runs) {
  DueUpdate& due = *param.due;
  const auto can_wait = [&](const AdamPiece& piece) {
    return device_.is_cpu() || (library() && library_takes(piece));
  };
  // One launch for all runs where the library takes them; it needs no memory.
  for (const Run& run : runs) {
    if (run.piece && can_wait(*run.piece)) {
      noted_.push_back({*run.piece, due.factor, due.factor_tensor});
    }
  }
  if (!batch_ || noted_.size() >= kMostNoted) launch();
  for (const Run& run : runs) {
    if (run.piece && !can_wait(*run.piece)) {
      if (batch_) launch();
      transport_.give();
      adam_torch(*run.piece, due.factor_tensor);
    }
    // After each, so that a second try after an allocation failed does what is left.
    for (size_t i = run.first; i < run.last; ++i) {
      ++param.members[i].step;
      due.outstanding[i] = false;
    }
    due.changed = true;
  }
}

void ShardedAdam::set_batch(bool on) {
  batch_ = on;
  launch();
}

void ShardedAdam::launch() {
  if (noted_.empty()) return;
  transport_.give();  // what makes the gradients, and the waits for who reads the weights
  const std::vector<Noted> noted = std::exchange(noted_, {});
  if (device_.is_cpu()) {
    for (const Noted& each : noted) adam_cpu(each.piece, each.factor);
    return;
  }
  std::vector<AdamPiece> together;
  for (size_t i = 0; i < noted.size(); ++i) {
    together.push_back(noted[i].piece);
    const bool last = i + 1 == noted.size() || !one_launch(noted[i].piece, noted[i + 1].piece) ||
                      !noted[i].factor_tensor.is_same(noted[i + 1].factor_tensor);
    if (!last) continue;
    adam_library(*library(), together, noted[i].factor_tensor);
    together.clear();
  }
}

const KernelLibrary* ShardedAdam::library() {
  return device_.is_cpu() ? nullptr : kernels().library;
}

const KernelChoice& ShardedAdam::kernels() {
  if (!kernels_) {
    kernels_ = device_.is_cuda()
                   ? choose_kernels(KernelLibrary::beside_runtime(), device_index())
                   : KernelChoice{nullptr, device_.is_cpu() ? "this is a CPU" : "no CUDA device"};
  }
  return *kernels_;
}

int ShardedAdam::device_index() const {
  if (device_.has_index()) return device_.index();
  return c10::impl::VirtualGuardImpl(device_.type()).getDevice().index();
}

StepResult ShardedAdam::end() {
  if (!result_.skipped) ++steps_;
  StepResult result = std::move(result_);
  abandon();
  return result;
}

void ShardedAdam::abandon() {
  store_.zero_grad();
  for (const auto& param : store_.params()) param->early.reset();
  factor_tensor_.reset();
  squared_sum_.reset();
  result_ = {};
}

}  // namespace deepcompile
