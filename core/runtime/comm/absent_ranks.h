// SPDX-License-Identifier: Apache-2.0
// AbsentRanks: who did not come to a collective that failed on the host.
//
// A rank whose collective fails only knows that it waited. All that wait in the same one fail at
// about the same time, so each says so in the process group's store, and looks there for the
// others for a little while: who says nothing is gone, or somewhere else.
#pragma once

#include <c10/util/intrusive_ptr.h>

#include <chrono>
#include <cstdint>
#include <string>

namespace c10d {
class ProcessGroup;
}

namespace deepcompile {

class AbsentRanks {
 public:
  // `patience`: how long the others are looked for.
  AbsentRanks(c10::intrusive_ptr<c10d::ProcessGroup> group, std::chrono::milliseconds patience);
  ~AbsentRanks();

  // Of a collective that failed here and has this name on all ranks: " (no word of it from rank
  // 1: ...)", or that all ranks were in it. Empty if the store is gone. Once for each name.
  std::string describe(const std::string& collective) const;

 private:
  c10::intrusive_ptr<c10d::ProcessGroup> group_;
  std::chrono::milliseconds patience_;
};

}  // namespace deepcompile
