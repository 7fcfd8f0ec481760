// SPDX-License-Identifier: Apache-2.0
#include "runtime/exec/moved_input.h"

#include <ATen/core/Tensor.h>

#include <set>

namespace deepcompile {
namespace {

constexpr size_t kMostPlaces = 8;

}  // namespace

void MovedInput::watch(const void* run, size_t index, How how, const std::string& name,
                       const RuntimeValue& input) {
  if (run == run_ && index == index_ && how == how_) return;  // seen already
  run_ = run;
  index_ = index;
  how_ = how;
  name_ = name;
  places_.clear();
  keep_place(input);
}

void MovedInput::see(const void* run, const std::vector<RuntimeValue>& inputs) {
  if (run == run_) keep_place(inputs[index_]);
}

void MovedInput::keep_place(const RuntimeValue& input) {
  if (how_ != How::kPlace || !input.isTensor() || !input.toTensor().defined()) return;
  if (places_.size() == kMostPlaces) places_.erase(places_.begin());
  places_.push_back(input.toTensor().const_data_ptr());
}

std::string MovedInput::text() const {
  if (how_ == How::kShape) return name_ + ", which has another shape or layout";
  if (how_ == How::kNumber) return name_ + ", which is another number";
  const std::string steps = std::to_string(places_.size());
  const size_t places = std::set<const void*>(places_.begin(), places_.end()).size();
  if (places_.size() < 2) return name_ + ", which lay at another place";
  if (places == 1) return name_ + ", which lay at one other place for " + steps + " steps";
  return name_ + ", which lay at " + std::to_string(places) + " places in " + steps + " steps";
}

}  // namespace deepcompile
