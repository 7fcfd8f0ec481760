// SPDX-License-Identifier: Apache-2.0
#include "runtime/comm/copy_engine.h"

#include <ATen/ops/empty.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstring>
#include <fstream>
#include <optional>
#include <utility>
#include <vector>

#include "base/error.h"
#include "runtime/comm/peer_memory.h"
#include "runtime/comm/stall_watch.h"

namespace deepcompile {
namespace {

using std::chrono::milliseconds;
using Streams = std::shared_ptr<const StreamPair>;

DeviceAddress address_of(const at::Tensor& tensor) {
  return reinterpret_cast<DeviceAddress>(tensor.const_data_ptr());
}

// The driver's handle of a stream of torch's; on a CPU there are none.
Driver::Stream handle(const std::optional<c10::Stream>& stream) {
  return stream ? stream->native_handle() : nullptr;
}

class CopyEngineTransport final : public Transport {
 public:
  CopyEngineTransport(const GatherOptions& options, std::unique_ptr<Transport> base,
                      std::shared_ptr<const Driver> driver, int64_t rank, int64_t world,
                      c10::Device device, milliseconds timeout, Streams streams)
      : options_(options),
        base_(std::move(base)),
        driver_(std::move(driver)),
        streams_(std::move(streams)),
        rank_(rank),
        world_(world),
        memory_(driver_, rank, world, device),
        watch_(driver_, timeout) {
    memory_.used_on(handle(comm()));
  }

  std::unique_ptr<Transfer> gather(at::Tensor full, at::Tensor shard,
                                   std::shared_ptr<Span> span) override;
  void before_write(const at::Tensor& shard) override {
    if (PeerShard* const place = memory_.find(shard.const_data_ptr())) await_readers(place);
  }
  at::Tensor shard_memory(const std::string& name, int64_t numel, bool in_place,
                          c10::TensorOptions options) override {
    const int64_t bytes = numel * static_cast<int64_t>(options.dtype().itemsize());
    if (bytes < options_.least_bytes || numel == 0) return {};
    return memory_.allocate(name, numel, in_place, options);
  }
  at::Tensor sample_shard(int64_t bytes) override { return memory_.sample(bytes); }
  int64_t outside_bytes() const override { return memory_.bytes(); }

  std::unique_ptr<Transfer> reduce_scatter(at::Tensor piece, at::Tensor full,
                                           std::shared_ptr<Span> span) override {
    return base_->reduce_scatter(std::move(piece), std::move(full), std::move(span));
  }
  std::unique_ptr<Transfer> start_all_reduce(at::Tensor tensor, Reduction reduction) override {
    return base_->start_all_reduce(std::move(tensor), reduction);
  }
  void all_reduce(at::Tensor tensor, Reduction reduction) override {
    base_->all_reduce(std::move(tensor), reduction);
  }
  void broadcast(at::Tensor tensor) override { base_->broadcast(std::move(tensor)); }
  void barrier() override { base_->barrier(); }
  // On a device gathers share the base's stream. On a CPU a gather is over when
  // it has started, but what it should follow may not be.
  bool in_order() const override { return base_->in_order(); }

 private:
  class Pull;

  std::optional<c10::Stream> comm() const {
    return streams_ ? std::optional<c10::Stream>(streams_->comm()) : std::nullopt;
  }
  std::optional<c10::Stream> compute() const {
    return streams_ ? std::optional<c10::Stream>(streams_->compute()) : std::nullopt;
  }
  void pull(const PeerShard& shard, const at::Tensor& full, int64_t bytes, uint32_t ready);
  void await_readers(PeerShard* shard);
  template <typename Action>
  void watched(std::string what, const PeerShard& shard, uint32_t value,
               const std::optional<c10::Stream>& stream, Action&& action);
  void tell(std::vector<MemoryOp>* ops, const PeerShard& shard, uint32_t value) const;
  void await(std::vector<MemoryOp>* ops, const PeerShard& shard, uint32_t value) const;

  const GatherOptions options_;
  const std::unique_ptr<Transport> base_;
  const std::shared_ptr<const Driver> driver_;
  const Streams streams_;  // null on a CPU
  const int64_t rank_;
  const int64_t world_;
  PeerMemory memory_;
  StallWatch watch_;
};

// A gather under way: on a device its stream's last work, on a CPU it is over.
class CopyEngineTransport::Pull final : public Transfer {
 public:
  Pull(CopyEngineTransport& transport, PeerShard* shard, std::unique_ptr<Transfer> on_stream)
      : transport_(transport), shard_(shard), on_stream_(std::move(on_stream)) {}

  void wait() override {
    transport_.watch_.check();
    if (on_stream_) on_stream_->wait();
    if (shard_->in_place) transport_.await_readers(shard_);
  }

 private:
  CopyEngineTransport& transport_;
  PeerShard* shard_;
  std::unique_ptr<Transfer> on_stream_;
};

std::unique_ptr<Transfer> CopyEngineTransport::gather(at::Tensor full, at::Tensor shard,
                                                      std::shared_ptr<Span> span) {
  PeerShard* const place = memory_.find(shard.const_data_ptr());
  if (place == nullptr) return base_->gather(std::move(full), std::move(shard), std::move(span));
  watch_.check();
  if (!memory_.mapped()) memory_.map(*base_);
  const auto bytes = static_cast<int64_t>(shard.nbytes());
  DC_CHECK(bytes <= place->bytes && static_cast<int64_t>(full.nbytes()) == world_ * bytes,
           "a gather of " + place->name + " into a buffer of another size");
  // Order: whatever wrote the shard, or last used the full buffer's memory
  // (compute) -> pulls (comm).
  if (streams_) streams_->mark(streams_->compute()).block(streams_->comm());
  if (span) span->start(comm());
  ++place->round;
  const uint32_t ready = 2 * place->round - 1;
  watched("the gather of " + place->name, *place, ready, comm(),
          [&] { pull(*place, full, bytes, ready); });
  if (span) span->stop(comm());
  std::unique_ptr<Transfer> on_stream;
  if (streams_) {
    on_stream = std::make_unique<StreamTransfer>(streams_, std::vector<at::Tensor>{full, shard});
  }
  return std::make_unique<Pull>(*this, place, std::move(on_stream));
}

void CopyEngineTransport::pull(const PeerShard& shard, const at::Tensor& full, int64_t bytes,
                               uint32_t ready) {
  const Driver::Stream stream = handle(comm());
  std::vector<MemoryOp> ops;
  tell(&ops, shard, ready);
  await(&ops, shard, ready);
  driver_->run(std::move(ops), stream);
  for (int64_t d = 1; d <= world_; ++d) {
    const int64_t owner = (rank_ + d) % world_;
    const DeviceAddress to = address_of(full) + static_cast<DeviceAddress>(owner * bytes);
    const DeviceAddress from = shard.source(owner);
    if (to != from) driver_->copy(to, from, bytes, stream, options_.copies);
  }
  ops.clear();
  tell(&ops, shard, ready + 1);
  driver_->run(std::move(ops), stream);
}

void CopyEngineTransport::await_readers(PeerShard* shard) {
  if (shard->settled == shard->round) return;
  watch_.check();
  const uint32_t value = 2 * shard->round;
  watched("a write to " + shard->name, *shard, value, compute(), [&] {
    std::vector<MemoryOp> ops;
    await(&ops, *shard, value);
    driver_->run(std::move(ops), handle(compute()));
  });
  shard->settled = shard->round;
}

// Runs `action`, which makes `stream` wait until the shard's words reach `value`.
template <typename Action>
void CopyEngineTransport::watched(std::string what, const PeerShard& shard, uint32_t value,
                                  const std::optional<c10::Stream>& stream, Action&& action) {
  WatchedWait wait{.what = std::move(what), .words = {}, .value = value, .over = {}};
  for (int64_t rank = 0; rank < world_; ++rank) wait.words.push_back(shard.word(rank_, rank));
  if (stream) {
    action();
    auto event = std::make_shared<c10::Event>(stream->device_type());
    event->record(*stream);
    wait.over = [event] { return event->query(); };
    return watch_.add(std::move(wait));
  }
  auto over = std::make_shared<std::atomic<bool>>(false);
  wait.over = [over] { return over->load(); };
  watch_.add(std::move(wait));
  action();
  *over = true;
  watch_.check();
}

void CopyEngineTransport::tell(std::vector<MemoryOp>* ops, const PeerShard& shard,
                               uint32_t value) const {
  for (int64_t d = 1; d <= world_; ++d) {
    const int64_t rank = (rank_ + d) % world_;
    ops->push_back({MemoryOp::Kind::kWrite, shard.word(rank, rank_), value});
  }
}

void CopyEngineTransport::await(std::vector<MemoryOp>* ops, const PeerShard& shard,
                                uint32_t value) const {
  for (int64_t d = 1; d <= world_; ++d) {
    const int64_t rank = (rank_ + d) % world_;
    ops->push_back({MemoryOp::Kind::kWaitAtLeast, shard.word(rank_, rank), value});
  }
}

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
std::shared_ptr<const Driver> load_driver(const GatherOptions& options, c10::Device device,
                                          int64_t rank, Introduction* me) {
  put(&me->host, options.host.empty() ? this_host() : options.host);
  try {
    if (device.is_cpu() && options.library == kCudaLibrary) {
      throw TransportError("parameters are on the CPU, which has no copy engines");
    }
    const int number = device.is_cpu() ? static_cast<int>(rank) : device.index();
    auto driver = std::make_shared<const Driver>(options.library, number);
    put(&me->bus_id, driver->bus_id());
    if (!driver->copies(options.copies)) {
      throw TransportError("copies that prefer to overlap need a driver of CUDA 13 or newer");
    }
    return driver;
  } catch (const TransportError& error) {
    put(&me->error, error.what());
    return nullptr;
  }
}

// All ranks' introductions; TransportError, the same everywhere, if they rule pulls out.
std::vector<Introduction> introduce(Transport& base, c10::Device device, int64_t world,
                                    const Introduction& me) {
  const std::string mine(reinterpret_cast<const char*>(&me), sizeof(me));
  std::vector<Introduction> all;
  std::vector<std::string> errors;
  for (const std::string& text : exchange(base, device, world, mine, sizeof(me))) {
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
void try_peers(Transport& base, const std::shared_ptr<const Driver>& driver, int64_t rank,
               int64_t world, c10::Device device, const Streams& streams) {
  constexpr int64_t kNumel = 1024;
  const auto options = c10::TensorOptions().dtype(c10::kInt).device(device);
  PeerMemory memory(driver, rank, world, device);
  const Driver::Stream stream = streams ? streams->comm().native_handle() : nullptr;
  memory.used_on(stream);
  const at::Tensor mine = memory.allocate("trial", kNumel, /*in_place=*/false, options);
  mine.fill_(rank + 1);
  memory.map(base);
  const PeerShard& shard = *memory.find(mine.const_data_ptr());
  const at::Tensor received = at::empty({world, kNumel}, options);
  std::string error;
  try {
    if (streams) streams->mark(streams->compute()).block(streams->comm());
    for (int64_t peer = 0; peer < world; ++peer) {
      const auto to = static_cast<DeviceAddress>(peer * shard.bytes) + address_of(received);
      driver->copy(to, shard.source(peer), shard.bytes, stream, CopyKind::kPlain);
      driver->write(shard.word(peer, rank), static_cast<uint32_t>(rank + 1));
    }
    if (streams) streams->mark(streams->comm()).block(streams->compute());
  } catch (const TransportError& failed) {
    error = failed.what();
  }
  throw_first(exchange_errors(base, device, world, error));
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
  throw_first(exchange_errors(base, device, world, error));
}

std::shared_ptr<const Driver> connect(const GatherOptions& options, Transport& base, int64_t rank,
                                      int64_t world, c10::Device device, const Streams& streams) {
  Introduction me;
  auto driver = load_driver(options, device, rank, &me);
  std::string error;
  const std::vector<Introduction> all = introduce(base, device, world, me);
  for (int64_t peer = 0; peer < world; ++peer) {
    if (peer == rank || !error.empty()) continue;
    try {
      error = driver->why_no_access(all[static_cast<size_t>(peer)].bus_id.data());
    } catch (const TransportError& failed) {
      error = failed.what();
    }
  }
  throw_first(exchange_errors(base, device, world, error));
  try_peers(base, driver, rank, world, device, streams);
  return driver;
}

}  // namespace

GatherChoice choose_gathers(const GatherOptions& options, std::unique_ptr<Transport> base,
                            int64_t rank, int64_t world, c10::Device device, milliseconds timeout,
                            std::shared_ptr<const StreamPair> streams) {
  const bool demanded = options.transport == "copy_engine";
  if (!demanded && options.transport != "auto" && options.transport != "nccl") {
    throw UserError("[runtime] the transport of gathers is \"" + options.transport +
                    "\". Use nccl, copy_engine or auto.");
  }
  if (world == 1) return {std::move(base), "nccl", "one rank has nothing to gather"};
  if (options.transport == "nccl") return {std::move(base), "nccl", "compile.gather says so"};
  try {
    auto driver = connect(options, *base, rank, world, device, streams);
    auto transport =
        std::make_unique<CopyEngineTransport>(options, std::move(base), std::move(driver), rank,
                                              world, device, timeout, std::move(streams));
    return {std::move(transport), "copy_engine",
            demanded ? "compile.gather says so"
                     : "all ranks are on one host and read each other's memory"};
  } catch (const TransportError& error) {
    if (!demanded) return {std::move(base), "nccl", error.what()};
    throw UserError(std::string("[runtime] compile.gather is \"copy_engine\", which is not "
                                "possible here: ") +
                    error.what() + ". Use \"nccl\", or \"auto\" to take it where it is possible.");
  }
}

}  // namespace deepcompile
