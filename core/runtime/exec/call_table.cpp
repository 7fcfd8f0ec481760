// SPDX-License-Identifier: Apache-2.0
#include "runtime/exec/call_table.h"

#include <ATen/ops/from_blob.h>

#include <unordered_set>

namespace deepcompile {

std::pair<int64_t, at::Tensor> CallTable::open(std::shared_ptr<LoadedPlan> plan, int64_t updates) {
  auto call = std::make_shared<Call>();
  call->frame.slots.resize(plan->plan.values.size());
  call->plan = std::move(plan);
  call->updates = updates;
  {
    const std::lock_guard lock(mutex_);
    call->id = next_id_++;
    calls_.emplace(call->id, call);
  }
  const int64_t id = call->id;
  auto* cell = new int64_t(id);
  const std::weak_ptr<CallTable> table = weak_from_this();
  at::Tensor token = at::from_blob(
      cell, {1},
      [table, id](void* memory) {
        delete static_cast<int64_t*>(memory);
        if (const auto alive = table.lock()) alive->drop(id);
      },
      c10::TensorOptions().dtype(c10::kLong));
  return {id, std::move(token)};
}

std::shared_ptr<Call> CallTable::find(int64_t id) const {
  const std::lock_guard lock(mutex_);
  const auto found = calls_.find(id);
  return found == calls_.end() ? nullptr : found->second;
}

void CallTable::drop(int64_t id) noexcept {
  std::shared_ptr<Call> dropped;  // destroyed after the lock: values can hold other tokens
  const std::lock_guard lock(mutex_);
  const auto found = calls_.find(id);
  if (found == calls_.end()) return;
  dropped = std::move(found->second);
  calls_.erase(found);
}

std::vector<std::shared_ptr<Call>> CallTable::open_calls() const {
  const std::lock_guard lock(mutex_);
  std::vector<std::shared_ptr<Call>> calls;
  for (const auto& [id, call] : calls_) calls.push_back(call);
  return calls;
}

int64_t CallTable::saved_bytes() const {
  const std::lock_guard lock(mutex_);
  std::unordered_set<const void*> seen;
  int64_t bytes = 0;
  const auto count = [&](const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    const c10::Storage& storage = tensor.storage();
    if (!seen.insert(storage.unsafeGetStorageImpl()).second) return;
    bytes += static_cast<int64_t>(storage.nbytes());
  };
  for (const auto& [id, call] : calls_) call->frame.visit(count);
  return bytes;
}

size_t CallTable::size() const {
  const std::lock_guard lock(mutex_);
  return calls_.size();
}

}  // namespace deepcompile
