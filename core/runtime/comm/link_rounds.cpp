// SPDX-License-Identifier: Apache-2.0
#include "runtime/comm/link_rounds.h"

#include <utility>

#include "base/error.h"
#include "runtime/comm/rank_messages.h"

namespace deepcompile {
namespace {

constexpr int64_t kBlockBytes = 2 << 20;  // for a few words: the least the driver hands out

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
    held_ = memory_.allocate("a large parameter, in step,", 1, /*in_place=*/false, bytes);
  } catch (const UserError&) {
    error = "it has no memory for words that peers can write";
  }
  throw_first(messages.errors(error));
  memory_.map(messages);
  words_ = memory_.find(held_.const_data_ptr());
}

uint32_t LinkRounds::done(int64_t round) const {
  return number_ * static_cast<uint32_t>(world_) + static_cast<uint32_t>(round);
}

void LinkRounds::begin(PeerSignals::Steps* steps, std::vector<PeerSignals::Await>* awaits) {
  ++number_;
  signals_.tell(steps, *words_, done(0));
  signals_.await(steps, {words_, done(0)});
  awaits->push_back({words_, done(0)});
  awaits->push_back({words_, done(world_ - 2), (rank_ + 1) % world_});
}

void LinkRounds::copy(const std::vector<DeviceCopy>& copies) const {
  const std::optional<c10::Stream> comm = signals_.comm();
  for (size_t i = 0; i < copies.size(); ++i) {
    if (i > 0) {
      const uint32_t last = done(static_cast<int64_t>(i));
      PeerSignals::Steps steps;
      signals_.tell(&steps, *words_, last, (rank_ + world_ - 1) % world_);
      signals_.await(&steps, {words_, last, (rank_ + 1) % world_});
      signals_.run(std::move(steps), comm);
    }
    signals_.driver()->copy({copies[i]}, PeerSignals::handle(comm));
  }
}

}  // namespace deepcompile
