// SPDX-License-Identifier: Apache-2.0
// The instructions of a step, and what is true of each kind.
//
// Everything that is not compute is one of these, so a plan is a list of them.
// The table in op.cpp is the one place that knows an instruction's traits;
// parser, printer, verifier, simulator and executor read it.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

namespace deepcompile {

enum class Op : uint8_t {
  kGather,      // gather P        start making P whole; nothing if it is, or is on its way
  kWait,        // wait P          compute goes on only when P is whole
  kRelease,     // release P       give P's full buffer back; its shard stays
  kRun,         // run R           run a compiled region; again, in a later section, to recompute
  kReduce,      // reduce P (v..)  start the mean of P's gradients over ranks, into shards
  kAccumulate,  // accumulate P    wait for P's reduction, add it to P's gradient shard
  kNorm,        // norm            global gradient norm and clip factor, from the shards
  kUpdate,      // update P        apply P's gradient if it is complete; makes P's full buffer stale
  kDefer,       // defer P         leave P's update to the next `update P`, or to its next gather
  // P's optimizer states (master copy and moments) to the host and back.
  kOffloadStates,  // offload_states P  start copying them out
  kEvictStates,    // evict_states P    the copy is done: give their device memory back
  kReloadStates,   // reload_states P   allocate, and start copying them in
  kAwaitStates,    // await_states P    they are usable from here
  // Saved activations to the host and back.
  kOffload,  // offload (v..)   start copying them out; usable until they are evicted
  kEvict,    // evict (v..)     the copy is done: give their device memory back
  kReload,   // reload (v..)    allocate, and start copying them in
  kAwait,    // await (v..)     they are usable from here
};
inline constexpr int kOpCount = 17;

// The resource an instruction keeps busy. The host link has two directions,
// each a resource.
enum class Resource : uint8_t { kNone, kCompute, kLink, kToHost, kToDevice };
inline constexpr int kResourceCount = 5;

struct OpTraits {
  std::string_view name;  // its word in the text form
  bool takes_param;       // has a parameter operand
  bool takes_region;      // has a region operand
  bool takes_values;      // has a value list
  bool is_collective;     // every rank must issue it, in the same order
  Resource resource;
};

const OpTraits& traits(Op op);
std::optional<Op> parse_op(std::string_view word);

}  // namespace deepcompile
