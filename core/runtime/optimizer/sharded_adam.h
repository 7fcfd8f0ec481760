// SPDX-License-Identifier: Apache-2.0
// ShardedAdam: one optimizer step over the pieces this rank owns.
//
// A step is check and begin, with nothing due and no sum of this rank's alone between them, then
// the update section's norm and updates in the plan's order, then end. Every update consumes its
// gradient. An update may come later: a deferred one waits, with all it needs, for whoever applies
// it; or earlier: in the backward of the last micro batch, before begin. Members that no reduction
// had a gradient for are left alone, with their states and step numbers, as torch does with
// gradients that are None.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "runtime/cuda/library.h"
#include "runtime/memory/param_store.h"
#include "runtime/offload/state_mover.h"
#include "runtime/optimizer/adam.h"

namespace deepcompile {

struct StepOptions {
  double loss_scale_inv = 1.0;  // factor that undoes the loss scale
  bool check_finite = false;    // skip the step on every rank if any gradient is not finite
};

struct StepResult {
  // Global norm of the mean gradient, before clipping; absent without a `norm`.
  // A number on a CPU, a 0-dim tensor on a device (no host wait).
  std::optional<double> norm;
  at::Tensor norm_tensor;
  bool skipped = false;
};

class ShardedAdam {
 public:
  // clip: largest global norm, 0 for no clipping.
  ShardedAdam(ParamStore& store, StateMover& states, Transport& transport, c10::Device device,
              double clip);

  // UserError if a step cannot be taken now, or not with these options.
  void check(const StepOptions& options) const;
  // Agrees between ranks on which members have gradients (only after eager
  // reductions, which may differ) and on whether to skip. Collective.
  void begin(const StepOptions& options);
  // Collective. Can be called again after it failed for want of memory.
  void norm();
  void update(ParamState& param);
  // Takes P's gradient aside, with this step's settings; `apply` does the rest.
  void defer(ParamState& param);
  // Applies what is due; nothing if nothing is. What other ranks own is stale
  // then. Can be called again after it failed for want of memory.
  void apply(ParamState& param);
  // Until it is off, updates may be only noted down; `launch` starts those, in few
  // launches. For it the transport is given its batch of waits first.
  void set_batch(bool on);
  void launch();
  // Masters := the weights of P, which is whole, where they are not what the masters round to.
  void store(ParamState& param);
  // The same of what was written to P in place, equally on every rank, if its values are kept
  // between steps. Throws UserError if an update is due, which comes first.
  void take_written(ParamState& param);
  // In a backward: applies P's gradient if it is complete, else nothing.
  void update_early(ParamState& param);
  bool early() const;  // some parameter has had its update before the step
  StepResult end();    // drops what gradients are left
  void abandon();      // a failed step: drops the gradients

  // Which kernels serve the device; found when first asked for.
  const KernelChoice& kernels();

  // Set when reductions came from outside a plan, and ranks may disagree.
  bool members_may_differ = false;

  int64_t steps() const { return steps_; }
  void set_steps(int64_t steps) { steps_ = steps; }

 private:
  void agree_on_members();
  at::Tensor squared_sum_here();    // of this rank's pieces of the gradients, 0-dim
  const at::Tensor& squared_sum();  // all ranks'; collective the first time in a step
  void check_early(const StepOptions& options) const;
  void make_due(ParamState& param, double factor, const at::Tensor& factor_tensor);
  // Members [first, last) with equal settings, and their elements that this rank owns.
  struct Run {
    size_t first = 0;
    size_t last = 0;
    std::optional<AdamPiece> piece;  // none if it owns none
  };
  struct Noted {
    AdamPiece piece;
    double factor;             // on a CPU
    at::Tensor factor_tensor;  // on a device
  };
  const KernelLibrary* library();  // null: torch's kernels, or the CPU's
  Run run_of(ParamState& param, size_t first, size_t last);
  void update_runs(ParamState& param, const std::vector<Run>& runs);
  int device_index() const;

  ParamStore& store_;
  StateMover& states_;
  Transport& transport_;
  c10::Device device_;
  double clip_;
  int64_t steps_ = 0;  // steps that were not skipped

  StepOptions options_;
  StepResult result_;
  double factor_ = 1.0;       // on a CPU: every gradient's factor in this step
  at::Tensor factor_tensor_;  // on a device
  at::Tensor squared_sum_;    // all ranks', until `norm` or the step is done with it
  std::optional<KernelChoice> kernels_;
  bool batch_ = false;
  std::vector<Noted> noted_;
};

}  // namespace deepcompile
