// SPDX-License-Identifier: Apache-2.0
// MovedInput: the input for which a recorded run could not be replayed, and where it has
// been since, in words.
//
// Caller: Replays. Runs are told apart by address: they must live until the next forgets.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "runtime/exec/region.h"

namespace deepcompile {

class MovedInput {
 public:
  enum class How { kPlace, kShape, kNumber };

  // Input `index` of a run is not as it was recorded, the first of its step. Its places are
  // kept for as long as steps begin to differ here. `name`: as in "run r of forward 0 reads
  // value x".
  void watch(const void* run, size_t index, How how, const std::string& name,
             const RuntimeValue& input);
  // The run's turn has come, before it is known whether it fits.
  void see(const void* run, const std::vector<RuntimeValue>& inputs);
  std::string text() const;

 private:
  void keep_place(const RuntimeValue& input);

  const void* run_ = nullptr;
  size_t index_ = 0;
  How how_ = How::kPlace;
  std::string name_;
  std::vector<const void*> places_;  // in the last steps
};

}  // namespace deepcompile
