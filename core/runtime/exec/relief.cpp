// SPDX-License-Identifier: Apache-2.0
#include "runtime/exec/relief.h"

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <unordered_set>
#include <utility>

#include "runtime/memory/device_memory.h"

namespace deepcompile {
namespace {

constexpr int64_t kFirstWish = int64_t{256} << 20;  // bytes; doubled with every attempt
// Room below this part of the device is short. A region's scratch is less.
constexpr int64_t kScarcePart = 8;

}  // namespace

Relief::Relief(ParamStore& store, StateMover& states, ValueMover& values, CallTable& calls,
               c10::Device device)
    : store_(store), states_(states), values_(values), calls_(calls), device_(device) {}

void Relief::look(int64_t kept) {
  if (device_.is_cpu()) return;
  const auto [free, total] =
      c10::getDeviceAllocator(device_.type())->getMemoryInfo(device_.index());
  const DeviceMemory now = device_memory(device_);
  allocated_ = now.allocated.current;
  room_ = static_cast<int64_t>(free) + now.reserved.current - allocated_ - kept;
  scarce_ = static_cast<int64_t>(total) / kScarcePart;
}

bool Relief::armed() const {
  return limit_ > 0 || is_short_of(0);
}

bool Relief::is_short_of(int64_t more) const {
  if (limit_ > 0) return held_bytes({}) + more > limit_;
  if (device_.is_cpu()) return false;
  return room_ - (device_memory(device_).allocated.current - allocated_) - more < scarce_;
}

int64_t Relief::held_bytes(const Frame& frame) const {
  int64_t bytes = 0;
  std::unordered_set<const void*> seen;
  const auto count = [&](const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.device() != device_) return;
    if (!seen.insert(tensor.storage().unsafeGetStorageImpl()).second) return;
    bytes += static_cast<int64_t>(tensor.storage().nbytes());
  };
  store_.visit(count);
  states_.visit(count);
  frame.visit(count);
  for (const std::shared_ptr<Call>& call : calls_.open_calls()) call->frame.visit(count);
  return bytes;
}

void Relief::check(const Frame& frame, int64_t more) const {
  if (limit_ <= 0) return;
  const int64_t held = held_bytes(frame);
  if (held + more <= limit_) return;
  throw c10::OutOfMemoryError({__func__, __FILE__, static_cast<uint32_t>(__LINE__)},
                              "it holds " + std::to_string(held) + " bytes and needs " +
                                  std::to_string(more) + " more, the limit is " +
                                  std::to_string(limit_));
}

bool Relief::relieve(int attempt, Frame* frame, const Needed& needed) {
  const int64_t wanted =
      limit_ > 0 ? std::max<int64_t>(1, limit_ >> 3) : kFirstWish << std::min(attempt, 20);
  int64_t freed = 0;
  for (const auto& param : store_.params()) freed += store_.drop_reduced(*param);
  if (freed < wanted) freed += evict_states(wanted - freed, needed.states);
  if (freed < wanted) freed += evict_values(wanted - freed, frame, needed.slots);
  if (freed < wanted) freed += evict_params(wanted - freed, needed.params);
  if (freed == 0) return false;
  ++report_.times;
  // What came free may be too cut up: let the allocator give it back and ask anew.
  if (!device_.is_cpu()) c10::getDeviceAllocator(device_.type())->emptyCache();
  return true;
}

int64_t Relief::evict_states(int64_t wanted, const ParamState* user) {
  int64_t freed = 0;
  // The last ones first: the update needs them last.
  const auto& params = store_.params();
  for (auto it = params.rbegin(); it != params.rend() && freed < wanted; ++it) {
    ParamState& param = **it;
    if (&param == user || !param.trainable) continue;
    const int64_t before = states_.device_bytes(param);
    if (before == 0) continue;
    states_.offload(param);
    states_.evict(param);
    freed += before - states_.device_bytes(param);
  }
  report_.states_bytes += freed;
  return freed;
}

int64_t Relief::evict_values(int64_t wanted, Frame* frame, const std::set<int32_t>& used) {
  int64_t freed = 0;
  const auto evict = [&](Frame* from, const std::set<int32_t>& spared) {
    for (size_t i = 0; i < from->slots.size() && freed < wanted; ++i) {
      const auto slot = static_cast<int32_t>(i);
      if (spared.count(slot) == 0) freed += values_.evict_now(from, slot);
    }
  };
  evict(frame, used);
  for (const std::shared_ptr<Call>& call : calls_.open_calls()) evict(&call->frame, {});
  report_.values_bytes += freed;
  return freed;
}

int64_t Relief::evict_params(int64_t wanted, const std::set<const ParamState*>& used) {
  int64_t freed = 0;
  for (const bool in_flight : {false, true}) {
    for (const auto& param : store_.params()) {
      if (freed >= wanted) break;
      if (used.count(param.get()) != 0) continue;
      if ((param->presence == Presence::kInFlight) != in_flight) continue;
      if (param->coming) continue;  // rows are not moved, and placing them may want memory
      // The others free nothing, and a wait for them may need what this rank has yet to start. A
      // gather of a sharded one needs nothing more of this rank once it was started.
      if (param->placement != Placement::kSharded) continue;
      if (in_flight) store_.wait(*param);
      freed += param->send_full_away();
    }
  }
  report_.params_bytes += freed;
  return freed;
}

std::string Relief::held_by_kind(const Frame& frame) const {
  std::string text;
  int64_t rest = held_bytes(frame);
  const auto add = [&](const std::string& kind, int64_t bytes) {
    if (bytes > 0) text.append(text.empty() ? "" : ", ").append(kind + " " + std::to_string(bytes));
  };
  for (const auto& [kind, bytes] : store_.buffer_report()) {
    if (kind == "masters" || kind == "states") continue;  // may be on the host: in the rest
    rest -= bytes;
    add(kind, bytes);
  }
  add("values and states", rest);
  return text;
}

ReliefReport Relief::take_report() {
  return std::exchange(report_, {});
}

}  // namespace deepcompile
