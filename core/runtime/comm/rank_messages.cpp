// SPDX-License-Identifier: Apache-2.0
#include "runtime/comm/rank_messages.h"

#include <ATen/ops/empty.h>

#include <cstring>

#include "base/error.h"

namespace deepcompile {

RankMessages::RankMessages(Transport& transport, c10::Device device, int64_t world)
    : transport_(transport), world_(world) {
  const auto bytes = c10::TensorOptions().dtype(c10::kByte);
  const auto most = static_cast<int64_t>(kBytes);
  text_ = at::empty({most}, bytes);
  mine_ = at::empty({most}, bytes.device(device));
  all_ = at::empty({world * most}, bytes.device(device));
}

std::vector<std::string> RankMessages::exchange(const std::string& mine, size_t size) {
  DC_CHECK(mine.size() <= size && size <= kBytes, "a message between ranks is too long");
  const auto length = static_cast<int64_t>(size);
  std::memset(text_.data_ptr(), 0, size);
  std::memcpy(text_.data_ptr(), mine.data(), mine.size());
  const at::Tensor shard = mine_.narrow(0, 0, length);
  shard.copy_(text_.narrow(0, 0, length));
  const at::Tensor full = all_.narrow(0, 0, world_ * length);
  transport_.gather(full, shard, nullptr)->wait();
  const at::Tensor host = full.cpu();
  std::vector<std::string> all;
  for (int64_t rank = 0; rank < world_; ++rank) {
    all.emplace_back(static_cast<const char*>(host.const_data_ptr()) + rank * length, size);
  }
  return all;
}

std::vector<std::string> RankMessages::errors(const std::string& mine) {
  std::vector<std::string> all = exchange(mine.substr(0, kBytes - 1), kBytes);
  for (std::string& text : all) text.resize(std::strlen(text.c_str()));
  return all;
}

void throw_first(const std::vector<std::string>& errors) {
  for (size_t rank = 0; rank < errors.size(); ++rank) {
    if (errors[rank].empty()) continue;
    throw TransportError("rank " + std::to_string(rank) + ": " + errors[rank]);
  }
}

}  // namespace deepcompile
