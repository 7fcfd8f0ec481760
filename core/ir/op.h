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
  kRun,         // run R           run a compiled region
  kReduce,      // reduce P (v..)  start the mean of P's gradients over ranks, into shards
  kAccumulate,  // accumulate P    wait for P's reduction, add it to P's gradient shard
  kNorm,        // norm            global gradient norm and clip factor, from the shards
  kUpdate,      // update P        optimizer step on P's shard; makes P's full buffer stale
};
inline constexpr int kOpCount = 8;

// The resource an instruction keeps busy.
enum class Resource : uint8_t { kNone, kCompute, kLink };

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
