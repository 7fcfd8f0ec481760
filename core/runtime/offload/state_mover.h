// SPDX-License-Identifier: Apache-2.0
// StateMover: optimizer states (the master copy, if it is one, and both
// moments) between the device and the host.
//
// The plan moves them by offload, evict, reload and await. Everybody else asks
// with `need` before touching a parameter's states: it brings them back, and
// ends what is under way. So a plan that moves them badly is slow, not wrong.
//
// Callers: the executor and the optimizer, under the runtime's lock.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <optional>
#include <unordered_map>

#include "runtime/memory/param_state.h"
#include "runtime/offload/host_link.h"

namespace deepcompile {

class StateMover {
 public:
  explicit StateMover(HostLink& link);

  // Starts copying out; nothing if they are there, or on their way.
  void offload(ParamState& param, const std::shared_ptr<Span>& span = nullptr);
  // Gives their device memory back; nothing if no copy of them was started.
  void evict(ParamState& param);
  // Allocates, and starts copying in; nothing if they are on the device.
  void reload(ParamState& param, const std::shared_ptr<Span>& span = nullptr);
  void await(ParamState& param);
  // They are on the device and may be changed.
  void need(ParamState& param);

  bool on_host(const ParamState& param) const;
  // Brings them to the host, all of them: moments that were never made are made there, as zeros.
  void make_on_host(ParamState& param);
  // For checkpoints: master, exp_avg, exp_avg_sq over the owned range, where
  // they are: on the host after an eviction, else on the device.
  std::array<at::Tensor, 3> at_rest(ParamState& param);

  int64_t device_bytes(ParamState& param) const;   // that an eviction would give back
  int64_t missing_bytes(ParamState& param) const;  // that an update would allocate for them
  int64_t host_bytes() const;                      // held for copies, valid or not
  // What is on its way to the device, beside what the parameters hold there.
  void visit(const std::function<void(const at::Tensor&)>& visitor) const;

 private:
  enum class At { kDevice, kLeaving, kHost, kReturning };
  struct States {
    At at = At::kDevice;
    std::array<HostBuffer, 3> host;
    std::array<int64_t, 3> numel{};  // of what moved; 0: was not there
    c10::ScalarType dtype = c10::kFloat;
    std::array<at::Tensor, 3> arriving;
    HostCopy copy;
  };

  States* find(const ParamState& param);
  const States* find(const ParamState& param) const;

  HostLink& link_;
  std::shared_ptr<HostPool> pool_;
  std::unordered_map<const ParamState*, States> states_;  // of what ever moved
};

}  // namespace deepcompile
