// SPDX-License-Identifier: Apache-2.0
#include "runtime/comm/peer_connect.h"

#include <ATen/ops/empty.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <fstream>
#include <utility>
#include <vector>

#include "base/error.h"
#include "runtime/comm/copy_trial.h"
#include "runtime/comm/peer_memory.h"

namespace deepcompile {
namespace {

// What a rank says of itself before anyone touches another's memory.
struct Introduction {
  std::array<char, 64> host{};
  std::array<char, 32> bus_id{};
  std::array<char, 152> error{};
};

template <size_t Size>
void put(std::array<char, Size>* to, const std::string& text) {
  std::strncpy(to->data(), text.c_str(), Size - 1);
}

std::string this_host() {
  std::string id;
  std::ifstream boot("/proc/sys/kernel/random/boot_id");
  if (std::getline(boot, id)) return id;
  std::array<char, 64> name{};
  gethostname(name.data(), name.size() - 1);
  return name.data();
}

// This rank's driver, or why it has none.
std::shared_ptr<const Driver> load_driver(const CopyEngineOptions& options, c10::Device device,
                                          int64_t rank, Introduction* me) {
  put(&me->host, options.host.empty() ? this_host() : options.host);
  try {
    if (device.is_cpu() && options.library == kCudaLibrary) {
      throw TransportError("parameters are on the CPU, which has no copy engines");
    }
    const int number = device.is_cpu() ? static_cast<int>(rank) : device.index();
    auto driver = std::make_shared<const Driver>(options.library, number);
    put(&me->bus_id, driver->bus_id());
    if (options.copies == "together" && !driver->copies_together()) {
      throw TransportError("copies that run together need a driver of CUDA 13 or newer");
    }
    return driver;
  } catch (const TransportError& error) {
    put(&me->error, error.what());
    return nullptr;
  }
}

// All ranks' introductions; TransportError, the same everywhere, if they rule pulls out.
std::vector<Introduction> introduce(RankMessages& messages, const Introduction& me) {
  const std::string mine(reinterpret_cast<const char*>(&me), sizeof(me));
  std::vector<Introduction> all;
  std::vector<std::string> errors;
  for (const std::string& text : messages.exchange(mine, sizeof(me))) {
    std::memcpy(&all.emplace_back(), text.data(), sizeof(me));
    const bool same_host = all.back().host == all.front().host;
    errors.emplace_back(all.back().error.data());
    if (errors.back().empty() && !same_host) errors.back() = "it is on another host than rank 0";
  }
  throw_first(errors);
  return all;
}

// Writes a word and reads a shard of every peer, with waits of the host only: a
// stream that waited for what does not arrive could not be stopped.
void try_peers(RankMessages& messages, const std::shared_ptr<const Driver>& driver, int64_t rank,
               int64_t world, c10::Device device,
               const std::shared_ptr<const StreamPair>& streams) {
  constexpr int64_t kNumel = 1024;
  const auto options = c10::TensorOptions().dtype(c10::kInt).device(device);
  PeerMemory memory(driver, rank, world, device);
  const Driver::Stream stream = streams ? streams->comm().native_handle() : nullptr;
  memory.used_on(stream);
  at::Tensor mine;
  std::string error;
  try {
    mine = memory.allocate("trial", kNumel, /*in_place=*/false, options);
  } catch (const UserError&) {
    error = "it has no memory for a block that peers can read";
  }
  throw_first(messages.errors(error));
  mine.fill_(rank + 1);
  memory.map(messages);
  const PeerShard& shard = *memory.find(mine.const_data_ptr());
  const at::Tensor received = at::empty({world, kNumel}, options);
  try {
    if (streams) streams->comm_follows_compute();
    for (int64_t peer = 0; peer < world; ++peer) {
      const auto to = static_cast<DeviceAddress>(peer * shard.bytes) +
                      reinterpret_cast<DeviceAddress>(received.const_data_ptr());
      driver->copy({{to, shard.source(peer), shard.bytes}}, stream);
      driver->write(shard.word(peer, rank), static_cast<uint32_t>(rank + 1));
    }
    if (streams) streams->mark(streams->comm())->block(streams->compute());
  } catch (const TransportError& failed) {
    error = failed.what();
  }
  throw_first(messages.errors(error));
  const std::vector<uint32_t> words = driver->read(shard.word(rank, 0), world);
  const at::Tensor values = received.cpu();
  for (int64_t peer = 0; peer < world; ++peer) {
    const at::Tensor row = values[peer];
    const bool read = row.eq(peer + 1).all().item<bool>();
    const bool written = words[static_cast<size_t>(peer)] == static_cast<uint32_t>(peer + 1);
    if (read && written) continue;
    error = std::string(read ? "a word written by" : "memory read from") + " rank " +
            std::to_string(peer) + " did not arrive";
  }
  throw_first(messages.errors(error));
}

}  // namespace

PeerConnection connect_peers(const CopyEngineOptions& options, Transport& base, int64_t rank,
                             int64_t world, c10::Device device,
                             const std::shared_ptr<const StreamPair>& streams) {
  Introduction me;
  auto driver = load_driver(options, device, rank, &me);
  std::string error;
  RankMessages messages(base, device, world);
  const std::vector<Introduction> all = introduce(messages, me);
  for (int64_t peer = 0; peer < world; ++peer) {
    if (peer == rank || !error.empty()) continue;
    try {
      error = driver->why_no_access(all[static_cast<size_t>(peer)].bus_id.data());
    } catch (const TransportError& failed) {
      error = failed.what();
    }
  }
  throw_first(messages.errors(error));
  try_peers(messages, driver, rank, world, device, streams);
  if (options.copies != "auto") {
    const bool together = options.copies == "together";
    return {driver, together,
            std::string("copies run ") + (together ? "together" : "in turn") + ", as asked"};
  }
  if (!streams || world == 2) return {driver, false, "copies run in turn"};
  const CopyTrial trial = try_copies(messages, base, driver, rank, world, *streams);
  return {driver, trial.together, trial.why};
}

}  // namespace deepcompile
