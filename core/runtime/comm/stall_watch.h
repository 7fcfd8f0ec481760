// SPDX-License-Identifier: Apache-2.0
// StallWatch: finds the peer that a stream waits for in vain.
//
// A stream that waits for a word of memory waits for ever if the peer that
// should write it is gone, and no watchdog of the process group's sees that.
// The watch knows each wait and when it should be over. Past that it names the
// parameter and the peers on standard error, writes the words itself so that
// the stream ends, and from then on every transfer by copy engine is an error: what the stream
// computes then is never used. If even that does not end it, the process is
// ended, as NCCL's watchdog does.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "runtime/comm/driver.h"

namespace deepcompile {

// Words of this rank's memory that other ranks should bring to a value.
struct AwaitedWords {
  struct Word {
    int64_t rank;  // that writes it
    DeviceAddress address;
  };
  const char* what = "";                    // "the gather of", static
  std::shared_ptr<const std::string> name;  // "w1"; null: `what` says all
  std::vector<Word> words;
  uint32_t value = 0;
};

// A stream's wait for such words.
struct WatchedWait {
  std::vector<AwaitedWords> awaited;
  std::function<bool()> over;  // any thread may ask
  std::chrono::steady_clock::time_point since = std::chrono::steady_clock::now();
  bool late_alone = false;  // all words were there when it was late: it has once more as long
};

class StallWatch {
 public:
  StallWatch(std::shared_ptr<const Driver> driver, std::chrono::milliseconds timeout);
  ~StallWatch();

  void add(WatchedWait wait);
  // Throws TransportError if some wait was in vain.
  void check() const;

 private:
  void watch();
  // Empty if nobody is missing, for the first time.
  std::string diagnose(const WatchedWait& wait) const;
  // Writes what all wait for. Without the lock meanwhile.
  void release_all(std::unique_lock<std::mutex>* lock);

  std::shared_ptr<const Driver> driver_;
  std::chrono::milliseconds timeout_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<WatchedWait> waits_;  // oldest first
  std::string failure_;
  bool ended_ = false;
  std::thread thread_;
};

}  // namespace deepcompile
