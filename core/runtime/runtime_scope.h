// SPDX-License-Identifier: Apache-2.0
// What every public method of Runtime holds; for its own sources only.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "base/error.h"
#include "runtime/runtime.h"

namespace deepcompile {

// The lock, the device, no autograd, no autocast, and the compute stream.
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
      runtime.follow_stream(now);
    }
    runtime.compute_ = now;
  }

 private:
  std::lock_guard<std::recursive_mutex> lock_;
  c10::DeviceGuard device_;
  at::NoGradGuard no_grad_;
  c10::impl::ExcludeDispatchKeyGuard no_autocast_;
};

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
                    kPeerAdvice);
  }
}

// The same on P, whose states stay where they are; again with more room if it found no memory, so
// it must do no harm twice.
template <typename Action>
void Runtime::eagerly(const char* what, ParamState& param, Action&& action) {
  eagerly(what, param.name, [&] {
    const bool away = states_.on_host(param);
    for (int attempt = 0;; ++attempt) {
      std::string why;
      try {
        action();
        break;
      } catch (const c10::OutOfMemoryError& error) {
        why = error.what_without_backtrace();
      }
      Frame none;
      if (replays_.drop() || relief_.relieve(attempt, &none, {&param, {&param}, {}})) continue;
      throw OutOfMemory("[runtime] rank " + std::to_string(options_.rank) + ": " + what + " " +
                        param.name +
                        " (outside a plan) found no memory on the device, and nothing is left "
                        "that could go to the host: " +
                        why +
                        ". Use more ranks, or let the plan keep less "
                        "(compile.memory_budget).");
    }
    if (!away) return;
    states_.offload(param);
    states_.evict(param);
  });
}

}  // namespace deepcompile
