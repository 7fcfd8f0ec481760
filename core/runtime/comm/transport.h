// SPDX-License-Identifier: Apache-2.0
// Transport: how parameters and gradients move between ranks.
//
// A transfer is started, and later waited for. On a CPU waiting blocks the
// thread, up to the timeout. On a device a transfer runs on the transport's
// own stream, and waiting orders the current stream behind it without
// blocking the host: there a peer that hangs is found by the backend's
// watchdog, which the transport leaves in force.
//
// Callers: the parameter store and the optimizer, one thread at a time, with
// the same calls in the same order on every rank.
#pragma once

#include <ATen/core/Tensor.h>

#include <chrono>
#include <memory>
#include <stdexcept>
#include <string>

#include "runtime/trace.h"

namespace deepcompile {

// A transfer that failed or did not end in time. It says what the backend
// said; the caller adds rank, instruction and parameter.
class TransportError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};
// For the text of one that ends a section.
inline constexpr const char* kPeerAdvice =
    ". A peer stopped, is far behind, or transfers something else, as its batch or its path "
    "differs: see its output; raise the timeout if it is only slow.";

// What the sums of several reductions are added up in.
struct RunningTotal {
  at::Tensor tensor;   // 1-D, contiguous, f32 (f64 for f64), of a piece's elements
  double scale = 1;    // of each sum, rounded to the total's type
  bool first = false;  // nothing was added yet: what the tensor holds does not matter
};

// A transfer under way. It keeps its buffers alive; destroying one that was
// not waited for is safe (on a device, the current stream is ordered behind it).
class Transfer {
 public:
  virtual ~Transfer() = default;
  // Throws TransportError; or c10::OutOfMemoryError, after which it can be called again.
  virtual void wait() = 0;
  // As wait, but in a batch of waits nothing may be used until the batch is given.
  virtual void wait_in_batch() { wait(); }
  // As wait_in_batch, for a reduction whose sum, rounded to its piece's type, is wanted in
  // a total only. False: it could not, and the piece has the sum, as after wait.
  virtual bool wait_adding(const RunningTotal& to) {
    wait();
    return false;
  }
};

enum class Reduction { kSum, kMax };

// What is only noted down until the batch is given: then the device gets all of it
// together, in fewer steps, each of which costs the host and interrupts the kernels.
enum class Batch {
  kNone,
  kWaits,      // Transfer::wait_in_batch and before_write, which concern the compute stream
  kTransfers,  // gathers and reductions
};

class Transport {
 public:
  virtual ~Transport() = default;

  // Fills `full` with every rank's `shard`, in rank order. `shard` may be this
  // rank's piece of `full`. numel(full) == world * numel(shard).
  virtual std::unique_ptr<Transfer> gather(at::Tensor full, at::Tensor shard,
                                           std::shared_ptr<Span> span) = 0;

  // piece = sum over ranks of their r-th piece of `full`, in the element type
  // of `full`. numel(full) == world * numel(piece).
  // After `prepare_reduction` it does not fail for want of memory.
  virtual std::unique_ptr<Transfer> reduce_scatter(at::Tensor piece, at::Tensor full,
                                                   std::shared_ptr<Span> span) = 0;

  // Takes the memory that a reduce_scatter of such a piece, the next one, needs. Collective;
  // can be called again after an allocation failed.
  virtual void prepare_reduction(int64_t piece_bytes) {}

  // In place, under way on return.
  virtual std::unique_ptr<Transfer> start_all_reduce(at::Tensor tensor, Reduction reduction) = 0;

  // In place; done (or ordered before the current stream's next work) on return.
  virtual void all_reduce(at::Tensor tensor, Reduction reduction) = 0;
  virtual void broadcast(at::Tensor tensor) = 0;  // from rank 0
  virtual void barrier() = 0;

  // True if a gather may read the piece of a reduction, of so many bytes, that
  // was started before it, without a wait between.
  virtual bool in_order(int64_t piece_bytes) const = 0;

  // What one-sided transports ask of shards; others do nothing.
  //
  // Zeros for a shard of `numel` elements that `gather` is asked for later, or,
  // if `in_place`, for a full buffer of world * numel that holds the shard of
  // this rank. Undefined: any memory will do. Called for the same shards in the
  // same order on every rank.
  virtual at::Tensor shard_memory(const std::string& name, int64_t numel, bool in_place,
                                  c10::TensorOptions options) {
    return {};
  }
  // The current stream's next work may write to the shard: no peer still reads
  // what its gathers so far asked for. Not a collective.
  virtual void before_write(const at::Tensor& shard) {}
  // Some shard of about `bytes`, to measure gathers with; undefined: any memory will do.
  virtual at::Tensor sample_shard(int64_t bytes) { return {}; }
  // A reduction of such a piece will be asked for. Before the first; the same
  // calls on every rank.
  virtual void expect_reduction(int64_t piece_bytes) {}
  // Device memory in use that torch's allocator does not know of.
  virtual int64_t outside_bytes() const { return 0; }

  // From now on, until it is called with kNone, calls of one kind may be noted down.
  // Gives what is noted. Others, and any wait for what is noted, work as ever.
  virtual void set_batch(Batch batch) {}
  // Starts what is noted; the batch goes on. Allocates nothing.
  virtual void give() {}
};

// One rank: every transfer is a copy, or nothing.
std::unique_ptr<Transport> make_loopback_transport();

}  // namespace deepcompile
