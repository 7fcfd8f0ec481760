// SPDX-License-Identifier: Apache-2.0
#include "runtime/offload/state_mover.h"

#include <ATen/ops/empty.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "base/error.h"

namespace deepcompile {

StateMover::StateMover(HostLink& link)
    : link_(link), pool_(std::make_shared<HostPool>(!link.device().is_cpu())) {}

StateMover::States* StateMover::find(const ParamState& param) {
  const auto found = states_.find(&param);
  return found == states_.end() ? nullptr : &found->second;
}

const StateMover::States* StateMover::find(const ParamState& param) const {
  const auto found = states_.find(&param);
  return found == states_.end() ? nullptr : &found->second;
}

void StateMover::offload(ParamState& param, const std::shared_ptr<Span>& span) {
  States& states = states_[&param];
  if (states.at == At::kReturning) need(param);
  if (states.at != At::kDevice) return;
  HostLink::Pairs pairs;
  const auto movable = param.movable_states();
  for (size_t i = 0; i < movable.size(); ++i) {
    const at::Tensor& state = *movable[i];
    states.numel[i] = state.defined() ? state.numel() : 0;
    if (!state.defined() || state.numel() == 0) continue;
    states.dtype = state.scalar_type();
    // The host buffer is the parameter's from its first offload on.
    if (!states.host[i].defined()) {
      states.host[i] = pool_->take(static_cast<int64_t>(state.nbytes()));
    }
    pairs.emplace_back(state, states.host[i].flat(state.numel(), states.dtype));
  }
  if (pairs.empty()) return;
  states.copy = link_.out(pairs, span);
  states.at = At::kLeaving;
}

void StateMover::evict(ParamState& param) {
  States* states = find(param);
  if (states == nullptr || states->at != At::kLeaving) return;
  // Order: copy (out) -> reuse of the device memory (compute).
  states->copy.wait();
  const auto movable = param.movable_states();
  for (size_t i = 0; i < movable.size(); ++i) {
    if (states->numel[i] > 0) movable[i]->reset();
  }
  states->at = At::kHost;
}

void StateMover::reload(ParamState& param, const std::shared_ptr<Span>& span) {
  States* states = find(param);
  if (states == nullptr || states->at != At::kHost) return;
  HostLink::Pairs pairs;
  std::array<at::Tensor, 3> arriving;
  const auto options = c10::TensorOptions().dtype(states->dtype).device(link_.device());
  for (size_t i = 0; i < arriving.size(); ++i) {
    if (states->numel[i] == 0) continue;
    arriving[i] = at::empty({states->numel[i]}, options);
    pairs.emplace_back(states->host[i].flat(states->numel[i], states->dtype), arriving[i]);
  }
  states->copy = link_.in(pairs, span);
  states->arriving = std::move(arriving);
  states->at = At::kReturning;
}

void StateMover::await(ParamState& param) {
  States* states = find(param);
  if (states == nullptr || states->at != At::kReturning) return;
  // Order: copy (in) -> update (compute), and -> the next copy out of the same
  // host buffer, which starts after compute.
  states->copy.wait();
  const auto movable = param.movable_states();
  for (size_t i = 0; i < movable.size(); ++i) {
    if (states->numel[i] > 0) *movable[i] = std::move(states->arriving[i]);
    states->arriving[i].reset();
  }
  states->at = At::kDevice;
}

void StateMover::need(ParamState& param) {
  States* states = find(param);
  if (states == nullptr || states->at == At::kDevice) return;
  if (states->at == At::kLeaving) {
    // They are about to change: the copy is of no use. It must still be over
    // before they do.
    states->copy.wait();
    states->at = At::kDevice;
    return;
  }
  reload(param);
  await(param);
}

bool StateMover::on_host(const ParamState& param) const {
  const States* states = find(param);
  return states != nullptr && states->at == At::kHost;
}

void StateMover::make_on_host(ParamState& param) {
  const int64_t numel = param.owned_range().size();
  if (numel == 0) return;
  if (!on_host(param)) {
    need(param);
    offload(param);
    evict(param);
  }
  States& states = states_[&param];
  states.dtype = param.master_dtype();
  for (size_t i = 1; i < states.host.size(); ++i) {
    if (states.numel[i] > 0) continue;
    states.numel[i] = numel;
    if (!states.host[i].defined()) {
      states.host[i] = pool_->take(numel * static_cast<int64_t>(c10::elementSize(states.dtype)));
    }
    states.host[i].flat(numel, states.dtype).zero_();
  }
  states.at = At::kHost;
}

std::array<at::Tensor, 3> StateMover::at_rest(ParamState& param) {
  const States* moved = find(param);
  if (!on_host(param) || moved->numel[1] == 0 || moved->numel[2] == 0) {
    need(param);
    return {param.master(), param.exp_avg(), param.exp_avg_sq()};
  }
  // Compute waited for the copies at the eviction; the host did not.
  if (!link_.device().is_cpu()) {
    c10::impl::VirtualGuardImpl(link_.device().type()).synchronizeDevice(link_.device().index());
  }
  States& states = *find(param);
  std::array<at::Tensor, 3> found;
  for (size_t i = 0; i < found.size(); ++i) {
    if (states.numel[i] > 0) found[i] = states.host[i].flat(states.numel[i], states.dtype);
  }
  if (!found[0].defined()) found[0] = param.owned();  // the weights are their own master
  return found;
}

int64_t StateMover::device_bytes(ParamState& param) const {
  int64_t bytes = 0;
  for (const at::Tensor* state : param.movable_states()) {
    if (state->defined()) bytes += static_cast<int64_t>(state->nbytes());
  }
  return bytes;
}

int64_t StateMover::missing_bytes(ParamState& param) const {
  const auto item = static_cast<int64_t>(c10::elementSize(param.master_dtype()));
  const int64_t moment = param.owned_range().size() * item;
  const States* states = find(param);
  const bool away = states != nullptr && states->at == At::kHost;
  int64_t bytes = away ? states->numel[0] * item : 0;
  const bool moments_here =
      param.exp_avg_if_made().defined() || (states != nullptr && states->at == At::kReturning);
  return moments_here ? bytes : bytes + 2 * moment;
}

void StateMover::visit(const std::function<void(const at::Tensor&)>& visitor) const {
  for (const auto& [param, states] : states_) {
    for (const at::Tensor& tensor : states.arriving) visitor(tensor);
  }
}

int64_t StateMover::host_bytes() const {
  return pool_->lent();
}

}  // namespace deepcompile
