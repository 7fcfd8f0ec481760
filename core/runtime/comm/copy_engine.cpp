// SPDX-License-Identifier: Apache-2.0
#include "runtime/comm/copy_engine.h"

#include <optional>
#include <utility>
#include <vector>

#include "base/error.h"
#include "runtime/comm/peer_connect.h"
#include "runtime/comm/peer_memory.h"
#include "runtime/comm/peer_signals.h"
#include "runtime/comm/push_reductions.h"

namespace deepcompile {
namespace {

using std::chrono::milliseconds;
using Streams = std::shared_ptr<const StreamPair>;

constexpr const char* kCopyEngine = "copy_engine";

DeviceAddress address_of(const at::Tensor& tensor) {
  return reinterpret_cast<DeviceAddress>(tensor.const_data_ptr());
}

class CopyEngineTransport final : public Transport {
 public:
  // pulls, pushes: whether gathers and reductions go by copy engine.
  CopyEngineTransport(const CopyEngineOptions& options, bool pulls, bool pushes,
                      std::unique_ptr<Transport> base, std::shared_ptr<const Driver> driver,
                      int64_t rank, int64_t world, c10::Device device, milliseconds timeout,
                      const Streams& streams)
      : options_(options),
        pulls_(pulls),
        base_(std::move(base)),
        streams_(streams),
        rank_(rank),
        world_(world),
        signals_(driver, rank, world, timeout, streams),
        memory_(driver, rank, world, device) {
    memory_.used_on(PeerSignals::handle(signals_.comm()));
    if (!pushes) return;
    reductions_.emplace(signals_, rank, world, device, options.least_bytes, options.copies);
  }

  std::unique_ptr<Transfer> gather(at::Tensor full, at::Tensor shard,
                                   std::shared_ptr<Span> span) override;
  void before_write(const at::Tensor& shard) override {
    if (PeerShard* const place = memory_.find(shard.const_data_ptr())) await_readers(place);
  }
  at::Tensor shard_memory(const std::string& name, int64_t numel, bool in_place,
                          c10::TensorOptions options) override {
    const int64_t bytes = numel * static_cast<int64_t>(options.dtype().itemsize());
    if (!pulls_ || bytes < options_.least_bytes || numel == 0) return {};
    return memory_.allocate(name, numel, in_place, options);
  }
  at::Tensor sample_shard(int64_t bytes) override { return memory_.sample(bytes); }
  int64_t outside_bytes() const override {
    return memory_.bytes() + (reductions_ ? reductions_->outside_bytes() : 0);
  }

  std::unique_ptr<Transfer> reduce_scatter(at::Tensor piece, at::Tensor full,
                                           std::shared_ptr<Span> span) override {
    if (pushed(static_cast<int64_t>(piece.nbytes()))) {
      return reductions_->start(std::move(piece), std::move(full), std::move(span), *base_);
    }
    return base_->reduce_scatter(std::move(piece), std::move(full), std::move(span));
  }
  void prepare_reduction(int64_t piece_bytes) override {
    if (pushed(piece_bytes)) reductions_->prepare(piece_bytes, *base_);
  }
  void expect_reduction(int64_t piece_bytes) override {
    if (reductions_) reductions_->expect(piece_bytes);
  }
  std::unique_ptr<Transfer> start_all_reduce(at::Tensor tensor, Reduction reduction) override {
    return base_->start_all_reduce(std::move(tensor), reduction);
  }
  void all_reduce(at::Tensor tensor, Reduction reduction) override {
    base_->all_reduce(std::move(tensor), reduction);
  }
  void broadcast(at::Tensor tensor) override { base_->broadcast(std::move(tensor)); }
  void barrier() override { base_->barrier(); }
  // On a device all share the base's stream, but for the sums of what is pushed.
  // On a CPU a gather is over when it has started, but what it should follow may not be.
  bool in_order(int64_t piece_bytes) const override {
    return !pushed(piece_bytes) && base_->in_order(piece_bytes);
  }

 private:
  class Pull;

  bool pushed(int64_t piece_bytes) const { return reductions_ && reductions_->takes(piece_bytes); }
  void pull(const PeerShard& shard, const at::Tensor& full, int64_t bytes, uint32_t ready);
  void await_readers(PeerShard* shard);

  const CopyEngineOptions options_;
  const bool pulls_;
  const std::unique_ptr<Transport> base_;
  const Streams streams_;  // null on a CPU
  const int64_t rank_;
  const int64_t world_;
  PeerSignals signals_;
  PeerMemory memory_;
  std::optional<PushReductions> reductions_;
};

// A gather under way: on a device its stream's last work, on a CPU it is over.
class CopyEngineTransport::Pull final : public Transfer {
 public:
  Pull(CopyEngineTransport& transport, PeerShard* shard, std::unique_ptr<Transfer> on_stream)
      : transport_(transport), shard_(shard), on_stream_(std::move(on_stream)) {}

  void wait() override {
    transport_.signals_.check();
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
  signals_.check();
  if (!memory_.mapped()) {
    RankMessages messages(*base_, full.device(), world_);
    memory_.map(messages);
  }
  const auto bytes = static_cast<int64_t>(shard.nbytes());
  DC_CHECK(bytes <= place->bytes && static_cast<int64_t>(full.nbytes()) == world_ * bytes,
           "a gather of " + place->name + " into a buffer of another size");
  // Order: whatever wrote the shard, or last used the full buffer's memory
  // (compute) -> pulls (comm).
  if (streams_) streams_->comm_follows_compute();
  if (span) span->start(signals_.comm());
  ++place->round;
  const uint32_t ready = 2 * place->round - 1;
  Mark done = signals_.watched("the gather of " + place->name, *place, ready, signals_.comm(),
                               [&] { pull(*place, full, bytes, ready); });
  if (span) span->stop(signals_.comm());
  std::unique_ptr<Transfer> on_stream;
  if (streams_) {
    on_stream = std::make_unique<StreamTransfer>(streams_, std::vector<at::Tensor>{full, shard},
                                                 std::move(done));
  }
  return std::make_unique<Pull>(*this, place, std::move(on_stream));
}

void CopyEngineTransport::pull(const PeerShard& shard, const at::Tensor& full, int64_t bytes,
                               uint32_t ready) {
  const Driver& driver = *signals_.driver();
  const Driver::Stream stream = PeerSignals::handle(signals_.comm());
  std::vector<MemoryOp> ops;
  signals_.tell(&ops, shard, ready);
  signals_.await(&ops, shard, ready);
  driver.run(std::move(ops), stream);
  for (int64_t d = 1; d <= world_; ++d) {
    const int64_t owner = (rank_ + d) % world_;
    const DeviceAddress to = address_of(full) + static_cast<DeviceAddress>(owner * bytes);
    const DeviceAddress from = shard.source(owner);
    if (to != from) driver.copy(to, from, bytes, stream, options_.copies);
  }
  ops.clear();
  signals_.tell(&ops, shard, ready + 1);
  driver.run(std::move(ops), stream);
}

void CopyEngineTransport::await_readers(PeerShard* shard) {
  if (shard->settled == shard->round) return;
  signals_.check();
  signals_.watched_wait("a write to " + shard->name, *shard, 2 * shard->round, signals_.compute());
  shard->settled = shard->round;
}

bool is_word(const std::string& word) {
  return word == "nccl" || word == kCopyEngine || word == "auto";
}

// What goes by copy engine if peers can be reached, and else by `base` for `why_not`.
Route route(const std::string& setting, const char* key, const std::string& why_not) {
  if (setting == "nccl") return {"nccl", std::string(key) + " says so"};
  if (!why_not.empty()) return {"nccl", why_not};
  return {kCopyEngine, setting == kCopyEngine
                           ? std::string(key) + " says so"
                           : "all ranks are on one host and reach each other's memory"};
}

constexpr const char* kGatherKey = "compile.gather";
constexpr const char* kReduceKey = "compile.reduce";

}  // namespace

TransportChoice choose_transport(const CopyEngineOptions& options, std::unique_ptr<Transport> base,
                                 int64_t rank, int64_t world, c10::Device device,
                                 milliseconds timeout, std::shared_ptr<const StreamPair> streams) {
  for (const auto& [setting, what] :
       {std::pair(options.gather, "gathers"), std::pair(options.reduce, "reductions")}) {
    if (is_word(setting)) continue;
    throw UserError(std::string("[runtime] the transport of ") + what + " is \"" + setting +
                    "\". Use nccl, copy_engine or auto.");
  }
  const bool pulls = options.gather != "nccl", pushes = options.reduce != "nccl";
  const auto over_base = [&](const std::string& why_not) {
    return TransportChoice{std::move(base), route(options.gather, kGatherKey, why_not),
                           route(options.reduce, kReduceKey, why_not)};
  };
  if (world == 1) {
    return {std::move(base),
            {"nccl", "one rank has nothing to gather"},
            {"nccl", "one rank has nothing to reduce"}};
  }
  if (!pulls && !pushes) return over_base("");
  try {
    auto driver = connect_peers(options, *base, rank, world, device, streams);
    auto transport = std::make_unique<CopyEngineTransport>(options, pulls, pushes, std::move(base),
                                                           std::move(driver), rank, world, device,
                                                           timeout, streams);
    return {std::move(transport), route(options.gather, kGatherKey, ""),
            route(options.reduce, kReduceKey, "")};
  } catch (const TransportError& error) {
    for (const auto& [setting, key] :
         {std::pair(options.gather, kGatherKey), std::pair(options.reduce, kReduceKey)}) {
      if (setting != kCopyEngine) continue;
      throw UserError(std::string("[runtime] ") + key +
                      " is \"copy_engine\", which is not possible here: " + error.what() +
                      ". Use \"nccl\", or \"auto\" to take it where it is possible.");
    }
    return over_base(error.what());
  }
}

}  // namespace deepcompile
