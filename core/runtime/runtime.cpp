// SPDX-License-Identifier: Apache-2.0
#include "runtime/runtime.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/mul.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>

#include "base/error.h"
#include "runtime/comm/c10d_transport.h"

namespace deepcompile {
namespace {

std::unique_ptr<Transport> make_transport(const RuntimeOptions& options) {
  if (options.world < 1 || options.rank < 0 || options.rank >= options.world) {
    throw UserError("[runtime] rank " + std::to_string(options.rank) + " of " +
                    std::to_string(options.world) + " ranks does not exist.");
  }
  if (options.accumulation < 1) {
    throw UserError("[runtime] accumulation is " + std::to_string(options.accumulation) +
                    "; a step has at least one micro-step.");
  }
  if (!(options.timeout_s > 0.0) || !(options.clip >= 0.0)) {
    throw UserError("[runtime] the timeout must be positive and the clipping norm not negative.");
  }
  if (options.world == 1) return make_loopback_transport();
  if (options.group_name.empty()) {
    throw UserError("[runtime] " + std::to_string(options.world) +
                    " ranks need a process group. Call torch.distributed.init_process_group.");
  }
  const auto timeout = std::chrono::milliseconds(static_cast<int64_t>(options.timeout_s * 1e3));
  return make_c10d_transport(options.group_name, options.rank, options.world, options.device,
                             timeout);
}

}  // namespace

// Held by every public method: the lock, the device, no autograd, no autocast,
// and the compute stream.
class Runtime::Scope {
 public:
  explicit Scope(Runtime& runtime)
      : lock_(runtime.mutex_),
        device_(runtime.options_.device),
        no_autocast_(c10::autocast_dispatch_keyset) {
    if (runtime.options_.device.is_cpu()) return;
    const c10::impl::VirtualGuardImpl guard(runtime.options_.device.type());
    const c10::Stream now = guard.getStream(runtime.options_.device);
    if (runtime.compute_ && *runtime.compute_ != now) {
      // Order: the last section (its stream) -> this one (the caller's stream).
      c10::Event event(runtime.options_.device.type());
      event.record(*runtime.compute_);
      event.block(now);
    }
    runtime.compute_ = now;
  }

 private:
  std::lock_guard<std::recursive_mutex> lock_;
  c10::DeviceGuard device_;
  at::NoGradGuard no_grad_;
  c10::impl::ExcludeDispatchKeyGuard no_autocast_;
};

Runtime::Runtime(const RuntimeOptions& options)
    : options_(options),
      transport_(make_transport(options)),
      store_(*transport_, options.rank, options.world, options.device, options.reduce_dtype,
             options.accumulation),
      optimizer_(store_, *transport_, options.device, options.clip),
      executor_(store_, optimizer_, tracer_, options.rank, options.device) {}

void Runtime::add_param(const ParamSpec& spec) {
  const Scope scope(*this);
  store_.add(spec);
}

void Runtime::set_hyper(const std::string& member, const Hyper& hyper) {
  const Scope scope(*this);
  store_.member(member).hyper = hyper;
}

// Runs `action` outside any plan, naming rank and parameter if a transfer fails.
template <typename Action>
void Runtime::eagerly(const char* what, const std::string& name, Action&& action) {
  const Scope scope(*this);
  try {
    action();
  } catch (const TransportError& error) {
    store_.abandon_transfers(/*reachable=*/false);
    throw UserError("[runtime] rank " + std::to_string(options_.rank) + ": " + what +
                    (name.empty() ? "" : " " + name) + " (outside a plan) failed: " + error.what() +
                    ". A peer stopped or is far behind: see its output; raise "
                    "the timeout if it is only slow.");
  }
}

void Runtime::gather(const std::vector<std::string>& names) {
  for (const std::string& name : names) {
    eagerly("gather", name, [&] { store_.gather(store_.at(name)); });
  }
}

void Runtime::wait(const std::vector<std::string>& names) {
  for (const std::string& name : names) {
    eagerly("wait", name, [&] { store_.wait(store_.at(name)); });
  }
}

void Runtime::release(const std::vector<std::string>& names) {
  for (const std::string& name : names) {
    eagerly("release", name, [&] { store_.release(store_.at(name)); });
  }
}

void Runtime::reduce(const std::string& name,
                     const std::vector<std::pair<std::string, at::Tensor>>& grads) {
  eagerly("reduce", name, [&] {
    ParamState& param = store_.at(name);
    MemberGrads by_index;
    for (const auto& [member, grad] : grads) {
      const auto found = std::find_if(param.members.begin(), param.members.end(),
                                      [&](const Member& m) { return m.name == member; });
      if (found == param.members.end()) {
        throw UserError("[runtime] parameter " + name + " has no member " + member + ".");
      }
      by_index.emplace(static_cast<size_t>(found - param.members.begin()), grad);
    }
    store_.reduce(param, by_index);
    optimizer_.members_may_differ = true;
  });
}

void Runtime::accumulate(const std::string& name) {
  eagerly("accumulate", name, [&] { store_.accumulate(store_.at(name)); });
}

bool Runtime::is_whole(const std::string& name) {
  const Scope scope(*this);
  return store_.at(name).presence == Presence::kWhole;
}

void Runtime::store(const std::vector<std::string>& names) {
  const Scope scope(*this);
  for (const std::string& name : names) {
    ParamState& param = store_.at(name);
    if (param.presence != Presence::kWhole) {
      throw UserError("[runtime] parameter " + name +
                      " is not whole, there is nothing to store. Gather it first.");
    }
    param.store_from_full();
  }
}

void Runtime::broadcast(const at::Tensor& tensor) {
  eagerly("broadcast", "", [&] { transport_->broadcast(tensor.detach()); });
}

void Runtime::barrier() {
  eagerly("barrier", "", [&] { transport_->barrier(); });
}

int64_t Runtime::load_plan(std::string_view text, std::vector<std::shared_ptr<RegionCode>> codes) {
  const Scope scope(*this);
  const PlanLimits limits{options_.world, options_.accumulation, options_.reduce_dtype};
  auto loaded =
      std::make_unique<LoadedPlan>(deepcompile::load_plan(text, std::move(codes), store_, limits));
  loaded->id = static_cast<int64_t>(plans_.size());
  plans_.push_back(std::move(loaded));
  return plans_.back()->id;
}

LoadedPlan& Runtime::plan_at(int64_t plan) {
  if (plan < 0 || plan >= static_cast<int64_t>(plans_.size())) {
    throw UserError("[runtime] no plan has id " + std::to_string(plan) + ". Load it first.");
  }
  return *plans_[static_cast<size_t>(plan)];
}

const PlanSection& Runtime::section_at(const LoadedPlan& loaded, int64_t section) const {
  if (section < 0 || section >= static_cast<int64_t>(loaded.plan.sections.size())) {
    throw UserError("[runtime] plan " + loaded.plan.name + " has no section " +
                    std::to_string(section) + ".");
  }
  return loaded.plan.sections[static_cast<size_t>(section)];
}

std::pair<int64_t, at::Tensor> Runtime::new_call(int64_t plan) {
  const Scope scope(*this);
  return calls_->open(plan, plan_at(plan).plan.values.size());
}

std::shared_ptr<Call> Runtime::call_for(const LoadedPlan& loaded, SectionKind kind, int64_t call) {
  const bool backward = kind == SectionKind::kBackward;
  std::shared_ptr<Call> found = call < 0 ? nullptr : calls_->find(call);
  if (call >= 0 && !found) {
    throw UserError("[runtime] plan " + loaded.plan.name + ": call " + std::to_string(call) +
                    " is over, its saved values are gone. A graph can be run backward once: "
                    "retain_graph=True is not supported.");
  }
  if (found && found->plan != loaded.id) {
    throw UserError("[runtime] call " + std::to_string(call) + " belongs to another plan than " +
                    loaded.plan.name + ".");
  }
  if (backward && (!found || !found->forward_ran)) {
    throw UserError("[runtime] plan " + loaded.plan.name +
                    ": its backward was called without a forward that keeps values.");
  }
  return found;
}

std::vector<RuntimeValue> Runtime::run(int64_t plan, int64_t section, int64_t call,
                                       std::vector<RuntimeValue> inputs) {
  const Scope scope(*this);
  LoadedPlan& loaded = plan_at(plan);
  const PlanSection& description = section_at(loaded, section);
  if (inputs.size() != description.inputs.size()) {
    throw UserError("[runtime] plan " + loaded.plan.name + ", section " + std::to_string(section) +
                    " takes " + std::to_string(description.inputs.size()) + " inputs, got " +
                    std::to_string(inputs.size()) + ".");
  }
  try {
    return run_section(loaded, static_cast<size_t>(section), call, std::move(inputs));
  } catch (...) {
    calls_->drop(call);
    throw;
  }
}

std::vector<RuntimeValue> Runtime::run_section(LoadedPlan& loaded, size_t section, int64_t call,
                                               std::vector<RuntimeValue> inputs) {
  const PlanSection& description = loaded.plan.sections[section];
  const std::shared_ptr<Call> kept = call_for(loaded, description.kind, call);
  std::vector<RuntimeValue> local;
  if (kept) {
    local = std::move(kept->values);  // back in place only if the section succeeds
    kept->values.clear();
  }
  local.resize(loaded.plan.values.size());
  for (size_t i = 0; i < inputs.size(); ++i) {
    local[static_cast<size_t>(description.inputs[i])] = std::move(inputs[i]);
  }
  executor_.run(loaded, section, &local);
  std::vector<RuntimeValue> outputs;
  outputs.reserve(description.outputs.size());
  for (const int32_t slot : description.outputs) {
    outputs.push_back(local[static_cast<size_t>(slot)]);
  }
  if (kept && description.kind == SectionKind::kForward) {
    kept->values.resize(local.size());
    for (const int32_t slot : loaded.kept[section]) {
      kept->values[static_cast<size_t>(slot)] = std::move(local[static_cast<size_t>(slot)]);
    }
    kept->forward_ran = true;
  } else {
    calls_->drop(call);
  }
  return outputs;
}

StepResult Runtime::step(int64_t plan, const StepOptions& options) {
  const Scope scope(*this);
  LoadedPlan& loaded = plan_at(plan);
  const auto& sections = loaded.plan.sections;
  const auto update = std::find_if(sections.begin(), sections.end(), [](const PlanSection& s) {
    return s.kind == SectionKind::kUpdate;
  });
  if (update == sections.end()) {
    throw UserError("[runtime] plan " + loaded.plan.name + " has no update section.");
  }
  eagerly("step", loaded.plan.name, [&] { optimizer_.begin(options); });
  std::vector<RuntimeValue> values(loaded.plan.values.size());
  try {
    executor_.run(loaded, static_cast<size_t>(update - sections.begin()), &values);
  } catch (...) {
    optimizer_.abandon();
    throw;
  }
  return optimizer_.end();
}

void Runtime::zero_grad() {
  const Scope scope(*this);
  store_.zero_grad();
}

std::vector<Piece> Runtime::pieces() {
  const Scope scope(*this);
  std::vector<Piece> pieces;
  for (const auto& param : store_.params()) {
    const Range owned = param->owned_range();
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
        piece.master = view(param->master());
        piece.exp_avg = view(param->exp_avg());
        piece.exp_avg_sq = view(param->exp_avg_sq());
      }
      pieces.push_back(std::move(piece));
    }
  }
  return pieces;
}

void Runtime::masters_changed() {
  for (const auto& param : store_.params()) {
    eagerly("gather", param->name, [&] {
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
  optimizer_.set_steps(step);
  for (const auto& param : store_.params()) {
    for (Member& member : param->members) member.step = step;
  }
}

void Runtime::set_member_step(const std::string& member, int64_t step) {
  const Scope scope(*this);
  store_.member(member).step = step;
}

BufferReport Runtime::buffer_report() {
  const Scope scope(*this);
  BufferReport report = store_.buffer_report();
  report["saved"] = calls_->saved_bytes();
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
