// SPDX-License-Identifier: Apache-2.0
#include "ir/op.h"

#include "base/error.h"

namespace deepcompile {
namespace {

// The order is Op's. A norm reads every gradient shard (compute) and then
// all-reduces one number, so it is a collective that keeps compute busy.
constexpr OpTraits kTraits[kOpCount] = {
    // name        param  region values collective resource
    {"gather", true, false, false, true, Resource::kLink},
    {"wait", true, false, false, false, Resource::kNone},
    {"release", true, false, false, false, Resource::kNone},
    {"run", false, true, false, false, Resource::kCompute},
    {"reduce", true, false, true, true, Resource::kLink},
    {"accumulate", true, false, false, false, Resource::kCompute},
    {"norm", false, false, false, true, Resource::kCompute},
    {"update", true, false, false, false, Resource::kCompute},
    {"defer", true, false, false, false, Resource::kNone},
    {"offload_states", true, false, false, false, Resource::kToHost},
    {"evict_states", true, false, false, false, Resource::kNone},
    {"reload_states", true, false, false, false, Resource::kToDevice},
    {"await_states", true, false, false, false, Resource::kNone},
    {"offload", false, false, true, false, Resource::kToHost},
    {"evict", false, false, true, false, Resource::kNone},
    {"reload", false, false, true, false, Resource::kToDevice},
    {"await", false, false, true, false, Resource::kNone},
};

}  // namespace

const OpTraits& traits(Op op) {
  const auto at = static_cast<size_t>(op);
  DC_CHECK(at < kOpCount, "unknown instruction");
  return kTraits[at];
}

std::optional<Op> parse_op(std::string_view word) {
  for (int i = 0; i < kOpCount; ++i) {
    if (kTraits[i].name == word) return static_cast<Op>(i);
  }
  return std::nullopt;
}

}  // namespace deepcompile
