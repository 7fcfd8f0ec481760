// SPDX-License-Identifier: Apache-2.0
#include "runtime/optimizer/sharded_adam.h"

#include <ATen/ops/full.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "runtime/optimizer/adam.h"

namespace deepcompile {
namespace {

// As torch.nn.utils.clip_grad_norm_ has it.
constexpr double kClipEps = 1e-6;

// This rank's piece of the gradient: the same elements for every placement.
at::Tensor gradient_piece(const ParamState& param) {
  if (param.placement != Placement::kReplicated) return param.gradient;
  return param.gradient.narrow(0, param.shard_range().start, param.shard_numel());
}

bool same_update(const Member& a, const Member& b) {
  const Hyper &x = a.hyper, &y = b.hyper;
  return a.has_grad == b.has_grad && a.step == b.step && x.lr == y.lr && x.beta1 == y.beta1 &&
         x.beta2 == y.beta2 && x.eps == y.eps && x.weight_decay == y.weight_decay &&
         x.decoupled == y.decoupled;
}

}  // namespace

ShardedAdam::ShardedAdam(ParamStore& store, Transport& transport, c10::Device device, double clip)
    : store_(store), transport_(transport), device_(device), clip_(clip) {}

void ShardedAdam::begin(const StepOptions& options) {
  for (const auto& param : store_.params()) {
    if (!param->pending) continue;
    throw UserError("[runtime] parameter " + param->name +
                    " has a reduction that was not accumulated. Accumulate it before the step.");
  }
  options_ = options;
  result_ = {};
  factor_ = options.loss_scale_inv;
  factor_tensor_.reset();
  if (!device_.is_cpu() && factor_ != 1.0) {
    factor_tensor_ = at::full({}, factor_, c10::TensorOptions().dtype(c10::kFloat).device(device_));
  }
  if (members_may_differ) agree_on_members();
  if (options.check_finite) result_.skipped = any_not_finite();
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

bool ShardedAdam::any_not_finite() const {
  bool found = false;
  for (const auto& param : store_.params()) {
    if (!param->gradient.defined()) continue;
    // The largest magnitude is finite exactly if all are, and a NaN stays one.
    const double largest =
        at::linalg_vector_norm(gradient_piece(*param), std::numeric_limits<double>::infinity())
            .item<double>();
    found = found || !std::isfinite(largest);
  }
  const at::Tensor flag =
      at::full({}, found ? 1.0 : 0.0, c10::TensorOptions().dtype(c10::kFloat).device(device_));
  transport_.all_reduce(flag, Reduction::kMax);
  return flag.item<double>() != 0.0;
}

void ShardedAdam::norm() {
  if (device_.is_cpu()) {
    const at::Tensor sum = at::zeros({}, c10::TensorOptions().dtype(c10::kDouble));
    double* total = sum.data_ptr<double>();
    for (const auto& param : store_.params()) {
      if (param->gradient.defined()) {
        *total += squared_sum_cpu(gradient_piece(*param), param->grad_scale);
      }
    }
    transport_.all_reduce(sum, Reduction::kSum);
    const double norm = std::sqrt(*total) * options_.loss_scale_inv;
    result_.norm = norm;
    if (clip_ > 0.0) factor_ *= std::min(1.0, clip_ / (norm + kClipEps));
    return;
  }
  const c10::TensorOptions options = c10::TensorOptions().dtype(c10::kFloat).device(device_);
  std::vector<at::Tensor> norms{at::zeros({}, options)};
  for (const auto& param : store_.params()) {
    if (!param->gradient.defined()) continue;
    norms.push_back(at::linalg_vector_norm(gradient_piece(*param), 2, {}, false, c10::kFloat)
                        .mul(param->grad_scale));
  }
  const at::Tensor sum = at::stack(norms).square().sum();
  transport_.all_reduce(sum, Reduction::kSum);
  result_.norm_tensor = sum.sqrt().mul(options_.loss_scale_inv);
  if (clip_ > 0.0) {
    const at::Tensor clip =
        result_.norm_tensor.add(kClipEps).reciprocal().mul(clip_).clamp_max(1.0);
    factor_tensor_ = clip.mul(options_.loss_scale_inv);
  }
}

void ShardedAdam::update(ParamState& param) {
  if (!param.gradient.defined()) return;
  if (!result_.skipped) {
    // Neighbours with equal settings are one stretch; the gaps between them
    // hold zeros, with zero gradients.
    bool any = false;
    for (size_t first = 0; first < param.members.size();) {
      size_t last = first + 1;
      while (last < param.members.size() &&
             same_update(param.members[first], param.members[last])) {
        ++last;
      }
      if (param.members[first].has_grad) {
        update_run(param, first, last);
        any = true;
      }
      first = last;
    }
    if (any) store_.owned_changed(param);
  }
  param.drop_gradient();
}

void ShardedAdam::update_run(ParamState& param, size_t first, size_t last) {
  const Range owned = param.owned_range();
  const int64_t begin = std::max(param.members[first].offset, owned.start);
  const int64_t end =
      std::min(param.members[last - 1].offset + param.members[last - 1].numel, owned.stop);
  for (size_t i = first; i < last; ++i) ++param.members[i].step;
  if (begin >= end) return;
  const auto piece_of = [&](const at::Tensor& tensor) {
    return tensor.narrow(0, begin - owned.start, end - begin);
  };
  AdamPiece piece{.master = piece_of(param.master()),
                  .exp_avg = piece_of(param.exp_avg()),
                  .exp_avg_sq = piece_of(param.exp_avg_sq()),
                  .gradient = piece_of(param.gradient),
                  .weight = {},
                  .grad_scale = param.grad_scale,
                  .step = param.members[first].step,
                  .hyper = param.members[first].hyper};
  if (param.master_if_copied().defined()) piece.weight = piece_of(param.owned());
  if (device_.is_cpu()) {
    adam_cpu(piece, factor_);
  } else {
    adam_device(piece, factor_tensor_);
  }
}

StepResult ShardedAdam::end() {
  if (!result_.skipped) ++steps_;
  StepResult result = std::move(result_);
  abandon();
  return result;
}

void ShardedAdam::abandon() {
  store_.zero_grad();
  factor_tensor_.reset();
  result_ = {};
}

}  // namespace deepcompile
