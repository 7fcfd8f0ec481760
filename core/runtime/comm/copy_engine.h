// SPDX-License-Identifier: Apache-2.0
// The copy engine transport: on one NVLink node, gathers are pulls from the
// peers' memory by the GPU's copy engines, and reductions pushes into it (see
// push_reductions.h), so they take no multiprocessor from compute. Everything
// else goes over the process group, on the same stream.
//
// Shards lie in PeerMemory. Gather number n of a shard, on the transfers'
// stream of each rank:
//
//   1. write 2n-1 to every rank's word for (shard, me): "mine is ready";
//   2. wait until all words for the shard here are at least 2n-1;
//   3. copy the shards of rank+1, rank+2, ... straight into the full buffer, ranks in
//      step (link_rounds.h); mine on a stream beside;
//   4. write 2n: "I have read yours".
//
// and before this rank writes to its shard (an update, a store, a load), the
// compute stream waits until all words are at least 2n, n the last gather here;
// unless it waited for a reduction that was given to the streams after that gather.
// Gathers of a batch do 1 and 4 for all together, 2 before the first copy that follows.
//
// Why that is enough:
// - Read after write: step 1 runs after whatever compute had been given before
//   the gather, the last update among it, and a word is written after all that
//   its stream and those it waited for wrote before. So after step 2 every
//   shard has the values of its owner's last update.
// - Write after read: the owner's wait covers every peer's pull of every gather
//   that the owner has asked for too; of a later one, no peer can pass step 2
//   before the owner's next step 1, which comes after its write. No reduction
//   between a gather and the update is relied on, so updates without one,
//   gathers for evaluation, store() and loads need no barrier of their own.
//   A reduction's pieces arrive after whatever their sender's stream was given before
//   them, so where one was waited for there is nothing to wait for.
// - No deadlock: all ranks give their streams the same gathers and reductions in
//   the same order and each writes its word before it waits. Small gathers of a batch wait for
//   all their words before the first copy; a large one, whose copies others may wait for
//   (link_rounds.h), waits for its own. A batch holds gathers back only while the compute stream
//   is given nothing that waits for a peer; but a rank that finds no memory at one of them
//   elsewhere starts those before it and waits (Relief): for copies of its own, which need
//   no more than words written at the batches' starts.
// - The host waits for nothing. Values grow by two with each gather and are
//   compared as differences, so they may go round.
//
// A full buffer whose shard is in place is written to by whoever likes once the
// gather was waited for; there the wait of step 4 is part of the gather's.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

#include "runtime/comm/driver.h"
#include "runtime/comm/stream_pair.h"
#include "runtime/comm/transport.h"

namespace deepcompile {

// Shards and pieces below this many bytes go over the process group: what a copy
// costs beside its bytes is then more than what it spares compute.
constexpr int64_t kLeastPeerBytes = 256 << 10;

// What keeping ranks in step costs is then little beside the copies.
constexpr int64_t kInStepBytes = 16 << 20;

constexpr const char* kCudaLibrary = "libcuda.so.1";

struct CopyEngineOptions {
  // Each "nccl" (the process group), "copy_engine" or "auto".
  std::string gather = "nccl";
  std::string reduce = "nccl";
  std::string library = kCudaLibrary;  // another one stands in for the driver, on CPUs too
  int64_t least_bytes = kLeastPeerBytes;
  // From each peer, or to it: larger transfers keep more than two ranks in step.
  int64_t in_step_bytes = kInStepBytes;
  // How words get to peers: "writes", "copies" or "auto", which tries writes first.
  std::string signals = "auto";
  std::string host;  // what this host is called; empty: by what it calls itself
};

// What transfers of one kind go over.
struct Route {
  std::string transport;  // "nccl" or "copy_engine"
  std::string why;
};

struct TransportChoice {
  std::unique_ptr<Transport> transport;
  Route gathers;
  Route reductions;
};

// What gathers and reductions go over, from now on: `base`, or copy engines
// beside it. Collective if those are asked for: then every rank maps a peer's
// memory, writes and reads there, and all find the same. Throws UserError if they
// are demanded and impossible. `streams`: null on a CPU.
TransportChoice choose_transport(const CopyEngineOptions& options, std::unique_ptr<Transport> base,
                                 int64_t rank, int64_t world, c10::Device device,
                                 std::chrono::milliseconds timeout,
                                 std::shared_ptr<const StreamPair> streams);

}  // namespace deepcompile
