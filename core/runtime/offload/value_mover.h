// SPDX-License-Identifier: Apache-2.0
// ValueMover: saved activations between the device and the host.
//
// A value comes back with the same sizes, strides and bits, in memory of its
// own. What cannot (it has gaps or overlaps, or was written to while it was
// being copied) stays on the device. A value whose memory another tensor
// shares frees nothing by its eviction, and is right all the same.
//
// Callers: the executor, under the runtime's lock.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "runtime/offload/frame.h"

namespace deepcompile {

class ValueMover {
 public:
  explicit ValueMover(HostLink& link);

  // As the plan's instructions; each skips what is not in its state.
  void offload(Frame* frame, const std::vector<int32_t>& slots, const std::shared_ptr<Span>& span);
  void evict(Frame* frame, const std::vector<int32_t>& slots);
  void reload(Frame* frame, const std::vector<int32_t>& slots, const std::shared_ptr<Span>& span);
  void await(Frame* frame, const std::vector<int32_t>& slots);

  // The value is on the device; brings it back if it is not.
  void fetch(Frame* frame, int32_t slot);
  // Bytes that `fetch` would allocate.
  static int64_t missing_bytes(const Frame& frame, int32_t slot);
  // Evicts at once, if that gives memory back: the bytes; else 0.
  int64_t evict_now(Frame* frame, int32_t slot);

  int64_t host_bytes() const { return pool_->lent(); }
  int64_t pool_bytes() const { return pool_->kept(); }

 private:
  bool can_move(const RuntimeValue& value) const;

  HostLink& link_;
  std::shared_ptr<HostPool> pool_;
};

}  // namespace deepcompile
