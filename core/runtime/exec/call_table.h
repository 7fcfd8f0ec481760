// SPDX-License-Identifier: Apache-2.0
// The values that calls keep between their forward and their backward.
//
// A call lives from its forward until its backward, or until the token that
// autograd holds for it is destroyed: a token's deleter runs on any thread, so
// the table has its own lock and never calls out while holding it. Tokens may
// outlive the table.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "runtime/exec/loaded_plan.h"
#include "runtime/offload/frame.h"

namespace deepcompile {

struct Call {
  int64_t id = 0;
  std::shared_ptr<LoadedPlan> plan;  // stays loaded until the call is over
  Frame frame;
  int64_t updates = 0;  // of the parameters, before its forward
  bool forward_ran = false;
};

class CallTable : public std::enable_shared_from_this<CallTable> {
 public:
  // A new call, and its token: an int64 CPU tensor of one element, the id.
  std::pair<int64_t, at::Tensor> open(std::shared_ptr<LoadedPlan> plan, int64_t updates = 0);
  std::shared_ptr<Call> find(int64_t id) const;           // null if it is gone
  void drop(int64_t id) noexcept;                         // nothing if it is gone
  std::vector<std::shared_ptr<Call>> open_calls() const;  // in the order they were opened
  int64_t saved_bytes() const;  // distinct storages kept for backwards, on the device
  size_t size() const;

 private:
  mutable std::mutex mutex_;
  int64_t next_id_ = 1;
  std::map<int64_t, std::shared_ptr<Call>> calls_;  // by id
};

}  // namespace deepcompile
