// SPDX-License-Identifier: Apache-2.0
#include "runtime/comm/flag_exchange.h"

#include <ATen/ops/zeros.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace deepcompile {

FlagExchange::FlagExchange(Transport& transport, c10::Device device)
    : transport_(transport), device_(device) {
  if (device.is_cpu()) return;
  side_ = c10::impl::VirtualGuardImpl(device.type())
              .getStreamFromGlobalPool(device, /*isHighPriority=*/false);
}

void FlagExchange::share(int64_t flag) {
  Slot& slot = slots_[static_cast<size_t>(shares_ % 3)];
  finish(&slot);  // three shares old
  if (!slot.flag.defined()) {
    const auto options = c10::TensorOptions().dtype(c10::kLong);
    slot.flag = at::zeros({1}, options.device(device_));
    slot.host = side_ ? at::zeros({1}, options.pinned_memory(true)) : slot.flag;
  }
  slot.flag.fill_(flag);
  slot.transfer = transport_.start_all_reduce(slot.flag, Reduction::kMax);
  ++shares_;
  if (!side_) return;
  // Order: the flag (compute), the all-reduce (comm), which one rank leaves out ->
  // copy to the host (side). Compute waits for neither: `finish` has the host wait
  // before the slot is filled again.
  c10::Event filled(device_.type());
  filled.record(c10::impl::VirtualGuardImpl(device_.type()).getStream(device_));
  filled.block(*side_);
  const c10::StreamGuard on_side(*side_);
  slot.transfer->wait();
  slot.host.copy_(slot.flag, /*non_blocking=*/true);
  slot.arrived.emplace(device_.type());
  slot.arrived->record(*side_);
}

void FlagExchange::finish(Slot* slot) {
  if (slot->arrived) slot->arrived->synchronize();
  slot->arrived.reset();
  const std::unique_ptr<Transfer> transfer = std::move(slot->transfer);
  if (transfer && !side_) transfer->wait();
}

int64_t FlagExchange::shared() {
  if (shares_ < 2) return 0;
  Slot& slot = slots_[static_cast<size_t>((shares_ - 2) % 3)];
  finish(&slot);
  return *slot.host.const_data_ptr<int64_t>();
}

}  // namespace deepcompile
