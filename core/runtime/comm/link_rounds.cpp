// SPDX-License-Identifier: Apache-2.0
#include "runtime/comm/link_rounds.h"

#include <optional>
#include <utility>

#include "base/error.h"
#include "runtime/comm/rank_messages.h"

namespace deepcompile {
namespace {

constexpr int64_t kBlockBytes = 2 << 20;  // for a few words: the least the driver hands out
// For messages, "the gather of ... waited 60 s for rank 1".
constexpr const char* kName =
    "a large parameter (ranks in step: who is named may wait for another)";

}  // namespace

LinkRounds::LinkRounds(PeerSignals& signals, Transport& base, int64_t rank, int64_t world,
                       c10::Device device, int64_t least_bytes)
    : signals_(signals),
      rank_(rank),
      world_(world),
      least_bytes_(least_bytes),
      memory_(signals.driver(), rank, world, device, kBlockBytes) {
  if (world == 2) return;
  RankMessages messages(base, device, world);
  memory_.used_on(PeerSignals::handle(signals.comm()));
  std::string error;
  try {
    const auto bytes = c10::TensorOptions().dtype(c10::kByte).device(device);
    held_ = memory_.allocate(kName, 1, /*in_place=*/false, bytes);
  } catch (const UserError&) {
    error = "it has no memory for words that peers can write";
  }
  throw_first(messages.errors(error));
  memory_.map(messages);
  words_ = memory_.find(held_.const_data_ptr());
}

uint32_t LinkRounds::after(uint32_t transfer, int64_t round) const {
  return transfer * static_cast<uint32_t>(world_) + static_cast<uint32_t>(round);
}

int64_t LinkRounds::behind(int64_t distance) const {
  return (rank_ + world_ - distance) % world_;
}

int64_t LinkRounds::ahead(int64_t distance) const {
  return (rank_ + distance) % world_;
}

void LinkRounds::begin(Direction direction, PeerSignals::Steps* steps,
                       std::vector<PeerSignals::Await>* awaits) {
  const bool same = std::exchange(direction_, direction) == direction;
  const uint32_t last = number_++;
  if (last > 0) {
    awaits->push_back({words_, after(last, world_ - 1), ahead(same ? 2 : 1)});
    signals_.await(steps, awaits->back());
  }
  awaits->push_back({words_, after(number_, world_ - 2), ahead(1)});
}

void LinkRounds::copy(const std::vector<DeviceCopy>& copies, PeerSignals::Steps* next) const {
  const std::optional<c10::Stream> comm = signals_.comm();
  for (size_t i = 0; i < copies.size(); ++i) {
    if (i > 0) {
      const uint32_t before = after(number_, static_cast<int64_t>(i));
      PeerSignals::Steps steps;
      signals_.tell(&steps, *words_, before, behind(1));
      signals_.await(&steps, {words_, before, ahead(1)});
      signals_.run(std::move(steps), comm);
    }
    signals_.driver()->copy({copies[i]}, PeerSignals::handle(comm));
  }
  for (const int64_t distance : {1, 2}) {
    signals_.tell(next, *words_, after(number_, world_ - 1), behind(distance));
  }
}

}  // namespace deepcompile
