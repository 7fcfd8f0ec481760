// SPDX-License-Identifier: Apache-2.0
// RankMessages: small messages of a fixed size between all ranks, which the hosts wait for.
//
// Takes all its memory when it is made. What several exchanges are part of so never stops
// between two of them because one rank is out of memory: that rank would begin anew, and its
// peers not.
//
// Callers: what sets up peer memory. Make one before the first exchange that peers wait for.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "runtime/comm/transport.h"

namespace deepcompile {

class RankMessages {
 public:
  static constexpr size_t kBytes = 256;  // the longest message

  // Not a collective; may throw c10::OutOfMemoryError.
  RankMessages(Transport& transport, c10::Device device, int64_t world);

  // Every rank's message of `size` bytes, in rank order. Collective.
  std::vector<std::string> exchange(const std::string& mine, size_t size);
  // What went wrong on each rank, if anything. Collective.
  std::vector<std::string> errors(const std::string& mine);

 private:
  Transport& transport_;
  int64_t world_;
  at::Tensor text_;  // on the host
  at::Tensor mine_;
  at::Tensor all_;
};

// TransportError of the first rank with an error.
void throw_first(const std::vector<std::string>& errors);

}  // namespace deepcompile
