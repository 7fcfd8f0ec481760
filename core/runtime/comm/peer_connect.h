// SPDX-License-Identifier: Apache-2.0
// Whether the ranks can reach each other's memory: asked of the driver, and tried.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "runtime/comm/copy_engine.h"
#include "runtime/comm/driver.h"
#include "runtime/comm/stream_pair.h"
#include "runtime/comm/transport.h"

namespace deepcompile {

// This rank's driver, once every rank has mapped each peer's memory, written and read there.
// Collective over `base`; throws TransportError, the same on every rank, naming the first rank
// that cannot and why. `streams`: null on a CPU.
std::shared_ptr<const Driver> connect_peers(const CopyEngineOptions& options, Transport& base,
                                            int64_t rank, int64_t world, c10::Device device,
                                            const std::shared_ptr<const StreamPair>& streams);

}  // namespace deepcompile
