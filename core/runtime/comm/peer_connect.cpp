// SPDX-License-Identifier: Apache-2.0
#include "runtime/comm/peer_connect.h"

#include <ATen/ops/empty.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <fstream>
#include <utility>
#include <vector>

#include "base/error.h"
#include "runtime/comm/peer_memory.h"

namespace deepcompile {
namespace {

// The first driver whose streams write no words of peers' memory, as NCCL's authors say
// (its issue 2052).
constexpr int kNoRemoteWrites = 13010;

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
std::shared_ptr<Driver> load_driver(const CopyEngineOptions& options, c10::Device device,
                                    int64_t rank, Introduction* me) {
  put(&me->host, options.host.empty() ? this_host() : options.host);
  try {
    if (device.is_cpu() && options.library == kCudaLibrary) {
      throw TransportError("parameters are on the CPU, which has no copy engines");
    }
    const int number = device.is_cpu() ? static_cast<int>(rank) : device.index();
    auto driver = std::make_shared<Driver>(options.library, number);
    put(&me->bus_id, driver->bus_id());
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

// A block of each rank, to try what its peers do with it. Waits for peers are the host's only: a
// stream that waited for what does not arrive could not be stopped.
class Trial {
 public:
  Trial(RankMessages& messages, std::shared_ptr<Driver> driver, int64_t rank, int64_t world,
        c10::Device device, const std::shared_ptr<const StreamPair>& streams)
      : messages_(messages),
        driver_(std::move(driver)),
        rank_(rank),
        world_(world),
        options_(c10::TensorOptions().dtype(c10::kInt).device(device)),
        streams_(streams),
        memory_(driver_, rank, world, device) {
    memory_.used_on(stream());
    std::string error;
    try {
      mine_ = memory_.allocate("trial", kNumel, /*in_place=*/false, options_);
    } catch (const UserError&) {
      error = "it has no memory for a block that peers can read";
    }
    throw_first(messages_.errors(error));
    mine_.fill_(rank + 1);
    memory_.map(messages_);
  }

  void read() {
    const at::Tensor received = at::empty({world_, kNumel}, options_);
    throw_first(together([&] {
      if (streams_) streams_->comm_follows_compute();
      for (int64_t peer = 0; peer < world_; ++peer) {
        const auto to = reinterpret_cast<DeviceAddress>(received[peer].const_data_ptr());
        driver_->copy({{to, shard().source(peer), shard().bytes}}, stream());
      }
      if (streams_) streams_->mark(streams_->comm())->block(streams_->compute());
    }));
    const at::Tensor values = received.cpu();
    throw_first(together([&] {
      for (int64_t peer = 0; peer < world_; ++peer) {
        if (values[peer].eq(peer + 1).all().item<bool>()) continue;
        throw TransportError("memory read from rank " + std::to_string(peer) + " did not arrive");
      }
    }));
  }

  // What a gather's streams do with words of this rank's own. The wait is over before it begins.
  void wait_on_stream() {
    throw_first(together([&] {
      using Kind = MemoryOp::Kind;
      driver_->run({{Kind::kWrite, word(rank_), 1}, {Kind::kWaitAtLeast, word(rank_), 1}},
                   stream());
    }));
  }

  // Words as the driver is set to send them, by the host and by a stream; errors of all ranks.
  std::vector<std::string> send_words() {
    const auto from_host = static_cast<uint32_t>(1 + driver_->copies_words());
    std::vector<std::string> errors = together([&] { write_all(from_host); });
    errors = first_of(std::move(errors), together([&] { expect(from_host); }));
    if (!driver_->copies_words()) return errors;
    const uint32_t from_stream = from_host + 1;
    errors = first_of(std::move(errors), together([&] {
                        driver_->write(word(rank_), from_stream);
                        for (int64_t peer = 0; peer < world_; ++peer) {
                          if (peer == rank_) continue;
                          driver_->copy({{word(peer), word(rank_), sizeof(from_stream)}}, stream());
                        }
                      }));
    return first_of(std::move(errors), together([&] { expect(from_stream); }));
  }

 private:
  static constexpr int64_t kNumel = 1024;

  Driver::Stream stream() const { return streams_ ? streams_->comm().native_handle() : nullptr; }
  const PeerShard& shard() { return *memory_.find(mine_.const_data_ptr()); }
  DeviceAddress word(int64_t on) { return shard().word(on, rank_); }

  // Runs `action` on every rank; what went wrong on each. What it gave the transfers' stream
  // is over on all ranks then, as messages take the same way.
  template <typename Action>
  std::vector<std::string> together(Action&& action) {
    std::string error;
    try {
      action();
    } catch (const TransportError& failed) {
      error = failed.what();
    }
    return messages_.errors(error);
  }
  static std::vector<std::string> first_of(std::vector<std::string> errors,
                                           const std::vector<std::string>& later) {
    for (size_t i = 0; i < errors.size(); ++i) {
      if (errors[i].empty()) errors[i] = later[i];
    }
    return errors;
  }

  void write_all(uint32_t value) {
    for (int64_t peer = 0; peer < world_; ++peer) driver_->write(word(peer), value);
  }
  void expect(uint32_t value) {
    const std::vector<uint32_t> words = driver_->read(shard().word(rank_, 0), world_);
    for (int64_t peer = 0; peer < world_; ++peer) {
      if (words[static_cast<size_t>(peer)] == value) continue;
      throw TransportError("a word written by rank " + std::to_string(peer) + " did not arrive");
    }
  }

  RankMessages& messages_;
  const std::shared_ptr<Driver> driver_;
  const int64_t rank_;
  const int64_t world_;
  const c10::TensorOptions options_;
  const std::shared_ptr<const StreamPair> streams_;
  PeerMemory memory_;
  at::Tensor mine_;
};

// Reads a shard of every peer and sends each a word, by writes or else by copies.
void try_peers(const CopyEngineOptions& options, RankMessages& messages,
               const std::shared_ptr<Driver>& driver, int64_t rank, int64_t world,
               c10::Device device, const std::shared_ptr<const StreamPair>& streams) {
  Trial trial(messages, driver, rank, world, device, streams);
  trial.read();
  trial.wait_on_stream();
  const bool known = options.signals == "auto" && driver->version() >= kNoRemoteWrites;
  driver->set_copies_words(options.signals == "copies" || known);
  std::vector<std::string> errors = trial.send_words();
  const auto failed = [](const std::string& error) { return !error.empty(); };
  if (options.signals == "auto" && !known && std::any_of(errors.begin(), errors.end(), failed)) {
    driver->set_copies_words(true);
    errors = trial.send_words();
  }
  throw_first(errors);
}

}  // namespace

std::shared_ptr<const Driver> connect_peers(const CopyEngineOptions& options, Transport& base,
                                            int64_t rank, int64_t world, c10::Device device,
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
  try_peers(options, messages, driver, rank, world, device, streams);
  return driver;
}

}  // namespace deepcompile
