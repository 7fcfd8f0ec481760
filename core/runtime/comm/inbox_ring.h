// SPDX-License-Identifier: Apache-2.0
// InboxRing: where the pieces of each reduction lie in a rank's inbox. A ring: the
// places follow from the order and sizes of reductions alone, so that all ranks
// agree on them without a word.
#pragma once

#include <cstdint>
#include <vector>

namespace deepcompile {

class InboxRing {
 public:
  explicit InboxRing(int64_t capacity) : capacity_(capacity) {}

  struct Place {
    int64_t begin = 0;   // bytes from the inbox's start
    uint64_t after = 0;  // the last reduction that had some of it; 0: none
  };
  // Of the next reduction; 0 < bytes <= capacity.
  Place next(int64_t bytes) const;
  // That place now belongs to reduction `number`, higher than all before.
  void take(const Place& place, int64_t bytes, uint64_t number);

 private:
  struct Use {
    int64_t begin, end;
    uint64_t number;
  };
  int64_t capacity_;
  int64_t head_ = 0;
  std::vector<Use> uses_;  // of each byte the last
};

}  // namespace deepcompile
