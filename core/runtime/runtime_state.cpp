// SPDX-License-Identifier: Apache-2.0
// Runtime: optimizer steps, states for checkpoints, memory and traces.
#include <ATen/ops/mul.h>

#include <algorithm>
#include <array>

#include "base/error.h"
#include "runtime/runtime.h"
#include "runtime/runtime_scope.h"

namespace deepcompile {

StepResult Runtime::step(int64_t plan, const StepOptions& options) {
  std::shared_ptr<LoadedPlan> keep;
  const Scope scope(*this);
  keep = plan_at(plan);
  LoadedPlan& loaded = *keep;
  const auto& sections = loaded.plan.sections;
  const auto update = std::find_if(sections.begin(), sections.end(), [](const PlanSection& s) {
    return s.kind == SectionKind::kUpdate;
  });
  if (update == sections.end()) {
    throw UserError("[runtime] plan " + loaded.plan.name + " has no update section.");
  }
  optimizer_.check(options);
  store_.check_storage();
  Frame frame;
  frame.slots.resize(loaded.plan.values.size());
  try {
    store_written();
    settle_here();
    reduce_local_sums();
    eagerly("step", loaded.plan.name, [&] { optimizer_.begin(options); });
    const auto counted = meter_.section([&] { return relief_.held_bytes(frame); });
    executor_.run(loaded, static_cast<size_t>(update - sections.begin()), &frame, calls_->size());
  } catch (...) {
    optimizer_.abandon();
    throw;
  }
  replays_.end_step();
  const StepResult result = optimizer_.end();
  if (result.skipped) return result;
  ++updates_;
  for (const auto& param : store_.params()) {
    if (!param->trainable) continue;
    for (Member& member : param->members) member.slot.mark_updated();
  }
  return result;
}

void Runtime::zero_grad() {
  const Scope scope(*this);
  if (optimizer_.early()) {
    throw UserError(
        "[runtime] zero_grad between the backward and the step: some parameters have had their "
        "update in the backward, which cannot be undone, and early updates forbid it. Call step "
        "first, or plan with place_optimizer at the step.");
  }
  store_.zero_grad();
}

void Runtime::set_last_micro_batch(bool last) {
  const Scope scope(*this);
  executor_.set_last_micro_batch(last);
}

void Runtime::abandon_step() {
  const Scope scope(*this);
  optimizer_.abandon();
}

void Runtime::settle_here() {
  for (const auto& param : store_.params()) {
    if (param->due) eagerly("update", *param, [&] { optimizer_.apply(*param); });
  }
}

void Runtime::reduce_local_sums() {
  for (const auto& param : store_.params()) {
    if (!param->local_sum.defined()) continue;
    eagerly("reduce", *param, [&] {  // again from where no memory was found
      if (!param->pending) store_.reduce(*param, {});
      store_.accumulate(*param);
    });
  }
}

void Runtime::settle() {
  settle_here();
  for (const auto& param : store_.params()) {
    if (param->placement == Placement::kSharded || param->presence == Presence::kWhole) continue;
    eagerly("gather", *param, [&] {
      store_.gather(*param);
      store_.wait(*param);
    });
  }
}

std::vector<Piece> Runtime::pieces() {
  const Scope scope(*this);
  store_written();
  settle_here();
  relief_.look(replays_.bytes());
  std::vector<Piece> pieces;
  for (const auto& param : store_.params()) {
    // The caller may write to them.
    eagerly("pieces", param->name, [&] { store_.before_change(*param); });
    const Range owned = param->owned_range();
    std::array<at::Tensor, 3> states;
    if (param->trainable) {
      // Moments that nobody made yet are made where there is room for them.
      const int64_t more = states_.missing_bytes(*param);
      if (more > 0 && relief_.is_short_of(more)) states_.make_on_host(*param);
      states = states_.at_rest(*param);
    }
    for (const Member& member : param->members) {
      const Range range = param->owned_range(member);
      if (range.size() == 0) continue;
      const auto view = [&](const at::Tensor& tensor) {
        return tensor.narrow(0, range.start - owned.start, range.size());
      };
      Piece piece;
      piece.param = param->name;
      piece.member = member.name;
      piece.start = range.start - member.offset;
      piece.stop = range.stop - member.offset;
      piece.weight = view(param->owned());
      piece.step = member.step;
      if (param->trainable) {
        piece.master = view(states[0]);
        piece.exp_avg = view(states[1]);
        piece.exp_avg_sq = view(states[2]);
      }
      pieces.push_back(std::move(piece));
    }
  }
  return pieces;
}

void Runtime::masters_changed() {
  settle_here();
  for (const auto& param : store_.params()) {
    eagerly("gather", *param, [&] {
      states_.need(*param);
      store_.before_change(*param);
      param->store_from_master();
      store_.owned_changed(*param);
      if (param->placement != Placement::kWhole) return;
      store_.gather(*param);
      store_.wait(*param);
    });
  }
}

at::Tensor Runtime::gradient(const std::string& name) {
  const Scope scope(*this);
  const ParamState& param = store_.at(name);
  if (!param.gradient.defined()) return {};
  const bool wide = param.gradient.scalar_type() == c10::kDouble;
  return at::mul(param.gradient.to(wide ? c10::kDouble : c10::kFloat), param.grad_scale);
}

int64_t Runtime::optimizer_steps() {
  const Scope scope(*this);
  return optimizer_.steps();
}

void Runtime::set_step(int64_t step) {
  const Scope scope(*this);
  settle_here();
  optimizer_.set_steps(step);
  for (const auto& param : store_.params()) {
    for (Member& member : param->members) member.step = step;
  }
}

void Runtime::set_member_step(const std::string& member, int64_t step) {
  const Scope scope(*this);
  settle_here();
  store_.member(member).step = step;
}

void Runtime::share(int64_t flag) {
  eagerly("share", "", [&] { flags_.share(flag); });
}

int64_t Runtime::shared() {
  int64_t flag = 0;
  eagerly("shared", "", [&] { flag = flags_.shared(); });
  return flag;
}

LinkMeasures Runtime::measure_links(const std::vector<int64_t>& bytes, int64_t repeats) {
  if (repeats < 1 || std::any_of(bytes.begin(), bytes.end(), [](int64_t b) { return b < 1; })) {
    throw UserError("[runtime] measure_links wants sizes and repeats of at least 1.");
  }
  LinkMeasures measures;
  eagerly("measure_links", "", [&] {
    measures = deepcompile::measure_links(*transport_, link_, options_.world, options_.reduce_dtype,
                                          bytes, repeats);
  });
  return measures;
}

KernelReport Runtime::kernels() {
  const Scope scope(*this);
  const KernelChoice& choice = optimizer_.kernels();
  const std::string who =
      options_.device.is_cpu() ? "cpu" : (choice.library ? "deepcompile_cuda" : "torch");
  return {who, who, choice.why};
}

ReliefReport Runtime::relieved() {
  const Scope scope(*this);
  return relief_.take_report();
}

void Runtime::limit_bytes(int64_t bytes) {
  const Scope scope(*this);
  relief_.limit(bytes);
}

int64_t Runtime::peak_bytes() {
  const Scope scope(*this);
  return std::max(meter_.peak_bytes(), replays_.peak_bytes()) + transport_->outside_bytes();
}

void Runtime::reset_peak_bytes() {
  const Scope scope(*this);
  meter_.reset_peak();
}

int64_t Runtime::outside_bytes() {
  const Scope scope(*this);
  return transport_->outside_bytes();
}

ReplayReport Runtime::replays() {
  const Scope scope(*this);
  return replays_.report();
}

BufferReport Runtime::buffer_report() {
  const Scope scope(*this);
  BufferReport report = store_.buffer_report();
  report["saved"] = calls_->saved_bytes();
  report["host_states"] = states_.host_bytes();
  report["host_values"] = values_.host_bytes();
  report["host_pool"] = values_.pool_bytes();
  return report;
}

void Runtime::trace(bool on) {
  const Scope scope(*this);
  tracer_.set(on, compute_);
}

std::vector<TraceRecord> Runtime::records() {
  const Scope scope(*this);
  return tracer_.records();
}

}  // namespace deepcompile
