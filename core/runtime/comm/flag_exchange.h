// SPDX-License-Identifier: Apache-2.0
// FlagExchange: a number a step from each rank, and the largest of them, late.
//
// Nobody waits for a share: it is read two shares later, when it is long over.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>

#include "runtime/comm/transport.h"

namespace deepcompile {

class FlagExchange {
 public:
  FlagExchange(Transport& transport, c10::Device device);

  // Starts the maximum over ranks. Collective.
  void share(int64_t flag);
  // The result of the last share but one; 0 before there is one.
  int64_t shared();

 private:
  struct Slot {
    at::Tensor flag;  // on the device, one int64
    at::Tensor host;  // the same tensor on a CPU, else pinned
    std::unique_ptr<Transfer> transfer;
    std::optional<c10::Event> arrived;
  };

  void finish(Slot* slot);

  Transport& transport_;
  c10::Device device_;
  std::optional<c10::Stream> side_;  // none on a CPU
  int64_t shares_ = 0;
  std::array<Slot, 3> slots_;
};

}  // namespace deepcompile
