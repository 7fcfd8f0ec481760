// SPDX-License-Identifier: Apache-2.0
// Transports over a c10d process group: Gloo and the like on a CPU, NCCL and
// the like on a device.
//
// Gloo reduces f16 and bf16 by rounding after every hop of its ring; the order
// of the hops depends on the buffer's size alone, so equal buffers give equal
// bits. Reduce in f32 (reduce_dtype) where that rounding matters.
#pragma once

#include <chrono>
#include <memory>
#include <string>

#include "runtime/comm/stream_pair.h"
#include "runtime/comm/transport.h"

namespace deepcompile {

struct C10dTransport {
  std::unique_ptr<Transport> transport;
  std::shared_ptr<const StreamPair> streams;  // that transfers run on; null on a CPU
};

// `group_name` is ProcessGroup.group_name, under which c10d registers each
// group. Throws UserError if there is no such group, if its rank or size are
// not these, or if it has no backend for the device.
C10dTransport make_c10d_transport(const std::string& group_name, int64_t rank, int64_t world,
                                  c10::Device device, std::chrono::milliseconds timeout);

}  // namespace deepcompile
