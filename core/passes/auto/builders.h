// SPDX-License-Identifier: Apache-2.0
// Builders of one program's plans, to ask them questions side by side: each by a thread of its own.
// Answers do not depend on how many there are.
#pragma once

#include <algorithm>
#include <future>
#include <memory>
#include <thread>
#include <vector>

#include "passes/auto/builder.h"

namespace deepcompile {

class Builders {
 public:
  // The others, so many with the first, are made when they are asked first. All arguments outlive
  // this.
  Builders(AutoBuilder& first, const StepProgram& plain, const PassEnvironment& environment,
           size_t count = usual())
      : first_(first), plain_(plain), environment_(environment), others_(count - 1) {}

  // One a processor, up to four.
  static size_t usual() { return std::clamp(std::thread::hardware_concurrency(), 1u, 4u); }

  AutoBuilder& first() { return first_; }
  // One of them by itself, for its own thread.
  Builders alone(AutoBuilder& one) const { return {one, plain_, environment_, 1}; }
  // Simulations of the others.
  int simulations() const {
    int sum = 0;
    for (const auto& each : others_) sum += each ? each->simulations() : 0;
    return sum;
  }

  // ask(builder, i) for each i below `count`; the answers in that order.
  template <typename Ask>
  auto each(size_t count, const Ask& ask)
      -> std::vector<decltype(ask(std::declval<AutoBuilder&>(), size_t{}))> {
    using Answer = decltype(ask(first_, size_t{}));
    const size_t threads = std::clamp<size_t>(count, 1, others_.size() + 1);
    const auto part = [&](AutoBuilder& builder, size_t from) {
      std::vector<Answer> out;
      for (size_t i = from; i < count; i += threads) out.push_back(ask(builder, i));
      return out;
    };
    std::vector<std::future<std::vector<Answer>>> parts;
    for (size_t k = 1; k < threads; ++k) {
      parts.push_back(std::async(std::launch::async, [&, k] {
        auto& builder = others_[k - 1];
        if (!builder) builder = std::make_unique<AutoBuilder>(plain_, environment_);
        return part(*builder, k);
      }));
    }
    std::vector<std::vector<Answer>> all;
    all.push_back(part(first_, 0));
    for (auto& each : parts) all.push_back(each.get());
    std::vector<Answer> out;
    for (size_t i = 0; i < count; ++i) out.push_back(std::move(all[i % threads][i / threads]));
    return out;
  }

 private:
  AutoBuilder& first_;
  const StepProgram& plain_;
  const PassEnvironment& environment_;
  std::vector<std::unique_ptr<AutoBuilder>> others_;
};

}  // namespace deepcompile
