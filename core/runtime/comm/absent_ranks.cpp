// SPDX-License-Identifier: Apache-2.0
#include "runtime/comm/absent_ranks.h"

#include <algorithm>
#include <exception>
#include <thread>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <utility>
#include <vector>

namespace deepcompile {
namespace {

constexpr std::chrono::milliseconds kPause{50};

std::string no_word_from(const std::vector<int>& ranks) {
  std::string list;
  for (const int rank : ranks) list += (list.empty() ? "" : ", ") + std::to_string(rank);
  return ranks.size() == 1 ? " (no word of it from rank " + list +
                                 ": it ended, is somewhere else, or still waits)"
                           : " (no word of it from ranks " + list +
                                 ": they ended, are somewhere else, or still wait)";
}

}  // namespace

AbsentRanks::AbsentRanks(c10::intrusive_ptr<c10d::ProcessGroup> group,
                         std::chrono::milliseconds patience)
    : group_(std::move(group)), patience_(patience) {}

AbsentRanks::~AbsentRanks() = default;

std::string AbsentRanks::describe(const std::string& collective) const {
  const std::string key = "deepcompile/failed/" + collective + "/";
  try {
    const auto store = group_->getStore();
    if (!store) return "";
    store->set(key + std::to_string(group_->getRank()), std::vector<uint8_t>{1});
    std::vector<int> absent;
    for (int rank = 0; rank < group_->getSize(); ++rank) absent.push_back(rank);
    const auto end = std::chrono::steady_clock::now() + patience_;
    while (true) {
      std::erase_if(absent, [&](int rank) { return store->check({key + std::to_string(rank)}); });
      if (absent.empty()) return " (all ranks were in it)";
      if (std::chrono::steady_clock::now() >= end) break;
      std::this_thread::sleep_for(kPause);
    }
    return no_word_from(absent);
  } catch (const std::exception&) {  // rank 0, which keeps the store, is gone
    return "";
  }
}

}  // namespace deepcompile
