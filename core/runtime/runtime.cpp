// SPDX-License-Identifier: Apache-2.0
#include "runtime/runtime.h"

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "runtime/comm/c10d_transport.h"
#include "runtime/comm/copy_engine.h"
#include "runtime/runtime_scope.h"

namespace deepcompile {
namespace {

TransportChoice make_transport(const RuntimeOptions& options) {
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
  const auto timeout = std::chrono::milliseconds(static_cast<int64_t>(options.timeout_s * 1e3));
  const auto choose = [&](C10dTransport base) {
    return choose_transport(options.copy_engine, std::move(base.transport), options.rank,
                            options.world, options.device, timeout, std::move(base.streams));
  };
  if (options.world == 1) return choose({make_loopback_transport(), nullptr});
  if (options.group_name.empty()) {
    throw UserError("[runtime] " + std::to_string(options.world) +
                    " ranks need a process group. Call torch.distributed.init_process_group.");
  }
  return choose(make_c10d_transport(options.group_name, options.rank, options.world, options.device,
                                    timeout));
}

}  // namespace

Runtime::Runtime(const RuntimeOptions& options) : Runtime(options, make_transport(options)) {}

Runtime::Runtime(const RuntimeOptions& options, TransportChoice chosen)
    : options_(options),
      gathers_(std::move(chosen.gathers)),
      reductions_(std::move(chosen.reductions)),
      transport_(std::move(chosen.transport)),
      link_(options.device),
      flags_(*transport_, options.device),
      store_(*transport_, options.rank, options.world, options.device, options.reduce_dtype,
             options.accumulation),
      states_(link_),
      values_(link_),
      optimizer_(store_, states_, *transport_, options.device, options.clip),
      relief_(store_, states_, values_, *calls_, options.device),
      meter_(options.device),
      replays_(options.recorder, options.no_recorder, meter_, options.device),
      executor_({store_, optimizer_, states_, values_, relief_, replays_, meter_, tracer_},
                *transport_, options.rank, options.device) {}

// Order: the last section (its stream) -> what comes now. What was taken there is not given back
// to it before the new stream has read it.
void Runtime::follow_stream(c10::Stream now) {
  const c10::impl::VirtualGuardImpl guard(options_.device.type());
  c10::Event event(options_.device.type());
  event.record(*compute_);
  event.block(now);
  const auto record = [&](const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.device() != options_.device || tensor.numel() == 0) return;
    guard.recordDataPtrOnStream(tensor.storage().data_ptr(), now);
  };
  store_.visit(record);
  states_.visit(record);
  for (const std::shared_ptr<Call>& call : calls_->open_calls()) call->frame.visit(record);
}

void Runtime::add_param(const ParamSpec& spec) {
  const Scope scope(*this);
  store_.add(spec);
}

void Runtime::exchange_rows_over(const std::string& group_name) {
  const Scope scope(*this);
  const auto timeout = std::chrono::milliseconds(static_cast<int64_t>(options_.timeout_s * 1e3));
  store_.rows().use_host_side(make_c10d_transport(group_name, options_.rank, options_.world,
                                                  c10::Device(c10::kCPU), timeout)
                                  .transport);
}

void Runtime::set_hyper(const std::string& member, const Hyper& hyper) {
  const Scope scope(*this);
  store_.member(member).hyper = hyper;
}

void Runtime::gather(const std::vector<std::string>& names) {
  for (const std::string& name : names) {
    ParamState& param = store_.at(name);
    eagerly("gather", param, [&] {
      optimizer_.apply(param);
      store_.gather(param);
    });
  }
}

void Runtime::wait(const std::vector<std::string>& names) {
  for (const std::string& name : names) {
    ParamState& param = store_.at(name);
    eagerly("wait", param, [&] { store_.wait(param); });
  }
}

void Runtime::release(const std::vector<std::string>& names) {
  for (const std::string& name : names) {
    eagerly("release", name, [&] {
      ParamState& param = store_.at(name);
      replays_.release(param);
      store_.release(param);
    });
  }
}

void Runtime::reduce(const std::string& name,
                     const std::vector<std::pair<std::string, at::Tensor>>& grads) {
  ParamState& param = store_.at(name);
  eagerly("reduce", param, [&] {
    MemberGrads by_index;
    for (const auto& [member, grad] : grads) {
      const auto found = std::find_if(param.members.begin(), param.members.end(),
                                      [&](const Member& m) { return m.name == member; });
      if (found == param.members.end()) {
        throw UserError("[runtime] parameter " + name + " has no member " + member + ".");
      }
      by_index.emplace(static_cast<size_t>(found - param.members.begin()), grad);
    }
    optimizer_.apply(param);
    store_.reduce(param, by_index);
    param.reduced_eagerly = true;
    optimizer_.members_may_differ = true;
  });
}

void Runtime::accumulate(const std::string& name) {
  ParamState& param = store_.at(name);
  eagerly("accumulate", param, [&] { store_.accumulate(param); });
}

bool Runtime::is_whole(const std::string& name) {
  const Scope scope(*this);
  const ParamState& param = store_.at(name);
  return param.presence == Presence::kWhole && !param.due && !param.full_is_away();
}

void Runtime::store(const std::vector<std::string>& names) {
  const Scope scope(*this);
  for (const std::string& name : names) {
    ParamState& param = store_.at(name);
    if (param.presence != Presence::kWhole || param.due) {
      throw UserError("[runtime] parameter " + name +
                      " is not whole, there is nothing to store. Gather it first.");
    }
    eagerly("store", param, [&] { optimizer_.store(param); });
  }
}

void Runtime::store_written() {
  for (const auto& param : store_.params()) {
    if (!param->is_written()) continue;
    eagerly("store", *param, [&] { optimizer_.take_written(*param); });
  }
}

bool Runtime::is_written(const std::string& member) {
  const Scope scope(*this);
  return store_.member(member).slot.is_written();
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
      std::make_shared<LoadedPlan>(deepcompile::load_plan(text, std::move(codes), store_, limits));
  loaded->id = next_plan_++;
  return plans_.emplace(loaded->id, loaded).first->first;
}

void Runtime::unload_plan(int64_t plan) {
  std::shared_ptr<LoadedPlan> unloaded;  // destroyed after the lock: its code can need the GIL
  const Scope scope(*this);
  unloaded = plan_at(plan);
  replays_.forget(plan);
  plans_.erase(plan);
}

std::shared_ptr<LoadedPlan> Runtime::plan_at(int64_t plan, int64_t call) {
  const auto found = plans_.find(plan);
  if (found != plans_.end()) return found->second;
  const std::shared_ptr<Call> open = call < 0 ? nullptr : calls_->find(call);
  if (open && open->plan->id == plan) return open->plan;
  throw UserError("[runtime] no plan has id " + std::to_string(plan) + ". Load it first.");
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
  return calls_->open(plan_at(plan), updates_);
}

std::shared_ptr<Call> Runtime::call_for(const LoadedPlan& loaded, SectionKind kind, int64_t call) {
  const bool backward = kind == SectionKind::kBackward;
  std::shared_ptr<Call> found = call < 0 ? nullptr : calls_->find(call);
  if (call >= 0 && !found) {
    throw UserError("[runtime] plan " + loaded.plan.name + ": call " + std::to_string(call) +
                    " is over, its saved values are gone. A graph can be run backward once: "
                    "retain_graph=True is not supported.");
  }
  if (found && found->plan->id != loaded.id) {
    throw UserError("[runtime] call " + std::to_string(call) + " belongs to another plan than " +
                    loaded.plan.name + ".");
  }
  if (backward && (!found || !found->forward_ran)) {
    throw UserError("[runtime] plan " + loaded.plan.name +
                    ": its backward was called without a forward that keeps values.");
  }
  if (backward && found->updates != updates_) {
    throw UserError("[runtime] plan " + loaded.plan.name +
                    ": the parameters were updated since its forward, so that its gradients would "
                    "be wrong. Call backward before step().");
  }
  return found;
}

std::vector<RuntimeValue> Runtime::run(int64_t plan, int64_t section, int64_t call,
                                       std::vector<RuntimeValue> inputs) {
  std::shared_ptr<LoadedPlan> keep;  // destroyed after the lock, as in unload_plan
  const Scope scope(*this);
  keep = plan_at(plan, call);
  LoadedPlan& loaded = *keep;
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
  Frame local;
  if (kept) local = std::exchange(kept->frame, {});  // back only if the section succeeds
  local.slots.resize(loaded.plan.values.size());
  for (size_t i = 0; i < inputs.size(); ++i) {
    local.at(description.inputs[i]) = std::move(inputs[i]);
  }
  {
    const auto counted = meter_.section([&] { return relief_.held_bytes(local); });
    executor_.run(loaded, section, &local, calls_->size());
  }
  std::vector<RuntimeValue> outputs;
  outputs.reserve(description.outputs.size());
  for (const int32_t slot : description.outputs) {
    outputs.push_back(replays_.for_caller(local.at(slot)));
  }
  if (kept && description.kind == SectionKind::kForward) {
    kept->frame.rows = std::move(local.rows);
    kept->frame.slots.resize(local.slots.size());
    for (const int32_t slot : loaded.kept[section]) {
      kept->frame.at(slot) = std::move(local.at(slot));
      if (const auto moved = local.moved.find(slot); moved != local.moved.end()) {
        kept->frame.moved.emplace(slot, std::move(moved->second));
      }
    }
    kept->forward_ran = true;
  } else {
    calls_->drop(call);
  }
  return outputs;
}

}  // namespace deepcompile
