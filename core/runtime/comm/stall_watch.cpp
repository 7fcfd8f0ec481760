// SPDX-License-Identifier: Apache-2.0
#include "runtime/comm/stall_watch.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <utility>

#include "runtime/comm/transport.h"

namespace deepcompile {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr auto kLongestNap = milliseconds(1000);
constexpr auto kGrace = std::chrono::seconds(30);  // for a stream to end once it was released

// An event that cannot be asked belongs to a device that is lost: others say so.
bool is_over(const WatchedWait& wait) {
  try {
    return wait.over();
  } catch (const std::exception&) {
    return true;
  }
}

bool reached(uint32_t word, uint32_t value) {
  return static_cast<int32_t>(word - value) >= 0;
}

}  // namespace

StallWatch::StallWatch(std::shared_ptr<const Driver> driver, milliseconds timeout)
    : driver_(std::move(driver)), timeout_(timeout), thread_([this] { watch(); }) {}

StallWatch::~StallWatch() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ended_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void StallWatch::add(WatchedWait wait) {
  const std::lock_guard<std::mutex> lock(mutex_);
  waits_.push_back(std::move(wait));
}

void StallWatch::check() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!failure_.empty()) throw TransportError(failure_);
}

void StallWatch::watch() {
  const auto nap = std::clamp(timeout_ / 8, milliseconds(5), milliseconds(kLongestNap));
  try {
    driver_->serve_this_thread();
  } catch (const std::exception&) {  // the device is lost: others say so
  }
  std::unique_lock<std::mutex> lock(mutex_);
  while (!ended_) {
    changed_.wait_for(lock, nap);
    while (!waits_.empty() && is_over(waits_.front())) waits_.pop_front();
    if (waits_.empty()) continue;
    WatchedWait& first = waits_.front();
    const auto now = steady_clock::now();
    const auto late = now - first.since;
    if (failure_.empty() && late > timeout_) {
      // The driver may be long about it, and others look in. `first` is this thread's.
      lock.unlock();
      std::string failure = diagnose(first);
      lock.lock();
      failure_ = std::move(failure);
      if (failure_.empty()) {  // all came; what the stream does before and after takes long
        first.late_alone = true;
        first.since = now;
        continue;
      }
      std::fprintf(stderr, "[runtime] %s\n", failure_.c_str());
      release_all(&lock);
    } else if (!failure_.empty() && late > timeout_ + kGrace) {
      std::fprintf(stderr, "[runtime] %s; its stream does not end\n", failure_.c_str());
      std::abort();
    } else if (!failure_.empty()) {
      release_all(&lock);  // of a transfer that was checked before the failure, and given after it
    }
  }
}

std::string StallWatch::diagnose(const WatchedWait& wait) const {
  std::array<char, 32> seconds{};
  std::snprintf(seconds.data(), seconds.size(), "%g", static_cast<double>(timeout_.count()) / 1e3);
  const auto begin = [&](const AwaitedWords& words) {
    return words.what + (words.name ? " " + *words.name : "") + " waited " + seconds.data() +
           " s for";
  };
  try {
    for (const AwaitedWords& words : wait.awaited) {
      std::string missing;
      for (const auto& [rank, word] : words.words) {
        if (reached(driver_->read(word, 1).front(), words.value)) continue;
        missing += " rank " + std::to_string(rank);
      }
      if (!missing.empty()) return begin(words) + missing;
    }
  } catch (const std::exception& error) {
    return begin(wait.awaited.front()) + " peers (" + error.what() + ")";
  }
  if (!wait.late_alone) return "";
  return begin(wait.awaited.front()) + " its own stream: all ranks were there";
}

void StallWatch::release_all(std::unique_lock<std::mutex>* lock) {
  const std::deque<WatchedWait> waits = waits_;
  lock->unlock();
  try {
    for (const WatchedWait& wait : waits) {
      for (const AwaitedWords& words : wait.awaited) {
        for (const auto& [rank, word] : words.words) {
          if (reached(driver_->read(word, 1).front(), words.value)) continue;
          driver_->write(word, words.value);
        }
      }
    }
  } catch (const std::exception&) {  // the grace ends it
  }
  lock->lock();
}

}  // namespace deepcompile
