// SPDX-License-Identifier: Apache-2.0
#include "runtime/comm/peer_memory.h"

#include <ATen/ops/from_blob.h>
#include <c10/core/CachingDeviceAllocator.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

#include "base/error.h"

namespace deepcompile {
namespace {

constexpr int64_t kPadBytes = 16 << 10;
constexpr int64_t kAlignment = 512;    // of a shard, in bytes
constexpr int64_t kGranule = 2 << 20;  // of a block: what the driver hands out
constexpr int64_t kFarewellSlot = 0;   // where peers say that they have let go
constexpr uint32_t kFarewell = 1;
constexpr auto kPatience = std::chrono::seconds(1);   // with peers that let go
constexpr auto kLastWork = std::chrono::seconds(10);  // with what the stream was given

int64_t round_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}

bool until(std::chrono::steady_clock::time_point deadline, const std::function<bool()>& done) {
  while (!done()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

}  // namespace

int64_t peer_aligned(int64_t bytes) {
  return round_up(bytes, kAlignment);
}

// One rank's allocation, and the same allocation of each peer once it is mapped.
class PeerBlock {
 public:
  PeerBlock(std::shared_ptr<const Driver> driver, int64_t bytes, int64_t rank, int64_t world)
      : driver_(std::move(driver)),
        bytes_(bytes),
        rank_(rank),
        bases_(static_cast<size_t>(world), 0) {
    bases_[static_cast<size_t>(rank)] = driver_->allocate(bytes);
  }
  ~PeerBlock();
  PeerBlock(const PeerBlock&) = delete;
  PeerBlock& operator=(const PeerBlock&) = delete;

  int64_t bytes() const { return bytes_; }
  int64_t world() const { return static_cast<int64_t>(bases_.size()); }
  DeviceAddress base(int64_t rank) const { return bases_[static_cast<size_t>(rank)]; }
  char* here() const { return reinterpret_cast<char*>(base(rank_)); }
  DeviceAddress word(int64_t rank, int64_t slot, int64_t source) const {
    return base(rank) + static_cast<DeviceAddress>((slot * world() + source) * 4);
  }

  bool mapped() const { return mapped_; }
  IpcHandle handle() const { return driver_->share(base(rank_)); }
  void open(const std::vector<std::string>& handles);
  void say_farewell() const;
  void close();
  void forget_peers() { mapped_ = false; }
  bool free_to_go() const;  // no peer maps it
  void give_up() noexcept;  // its memory

  int64_t next_slot = kFarewellSlot + 1;
  int64_t used = kPadBytes;

 private:
  std::shared_ptr<const Driver> driver_;
  int64_t bytes_;
  int64_t rank_;
  std::vector<DeviceAddress> bases_;  // by rank; a peer's is 0 while it is not mapped
  bool mapped_ = false;               // the peers have, or had, its handle
};

namespace {

// Whether all peers have written their farewell; `words`: one for each rank.
bool all_left(const Driver& driver, DeviceAddress words, int64_t rank, int64_t world) {
  const std::vector<uint32_t> said = driver.read(words, world);
  for (int64_t peer = 0; peer < world; ++peer) {
    if (peer != rank && said[static_cast<size_t>(peer)] != kFarewell) return false;
  }
  return true;
}

// Blocks that some peer still maps, from engines that are gone. Never destroyed.
struct Remains {
  std::mutex mutex;
  std::vector<std::function<bool()>> tries;  // each: true once its memory was given back

  static Remains& all() {
    static auto* const remains = new Remains;
    return *remains;
  }
  void bury() {
    const std::lock_guard<std::mutex> lock(mutex);
    tries.erase(std::remove_if(tries.begin(), tries.end(), [](const auto& t) { return t(); }),
                tries.end());
  }
};

}  // namespace

void PeerBlock::open(const std::vector<std::string>& handles) {
  mapped_ = true;
  for (int64_t rank = 0; rank < world(); ++rank) {
    const std::string& bytes = handles[static_cast<size_t>(rank)];
    const bool none = bytes.find_first_not_of('\0') == std::string::npos;  // it says why itself
    if (rank == rank_ || none) continue;
    IpcHandle handle;
    std::memcpy(handle.bytes, bytes.data(), sizeof(handle.bytes));
    bases_[static_cast<size_t>(rank)] = driver_->open(handle);
  }
}

void PeerBlock::say_farewell() const {
  for (int64_t rank = 0; rank < world(); ++rank) {
    if (rank == rank_ || base(rank) == 0) continue;
    driver_->write(word(rank, kFarewellSlot, rank_), kFarewell);
  }
}

void PeerBlock::close() {
  for (int64_t rank = 0; rank < world(); ++rank) {
    DeviceAddress& address = bases_[static_cast<size_t>(rank)];
    if (rank == rank_ || address == 0) continue;
    driver_->close(std::exchange(address, 0));
  }
}

bool PeerBlock::free_to_go() const {
  return !mapped_ || all_left(*driver_, word(rank_, kFarewellSlot, 0), rank_, world());
}

void PeerBlock::give_up() noexcept {
  try {
    driver_->free(std::exchange(bases_[static_cast<size_t>(rank_)], 0));
  } catch (const std::exception&) {  // the process ends, and the driver went first
  }
}

PeerBlock::~PeerBlock() {
  try {
    if (free_to_go()) {
      give_up();
      return;
    }
    const auto later = [driver = driver_, address = base(rank_),
                        words = word(rank_, kFarewellSlot, 0), rank = rank_, world = world()] {
      const bool left = all_left(*driver, words, rank, world);
      if (left) driver->free(address);
      return left;
    };
    Remains& remains = Remains::all();
    const std::lock_guard<std::mutex> lock(remains.mutex);
    remains.tries.emplace_back(later);
  } catch (const std::exception&) {
  }
}

DeviceAddress PeerShard::source(int64_t owner) const {
  const int64_t at = offset + (in_place ? owner * bytes : 0);
  return block->base(owner) + static_cast<DeviceAddress>(at);
}

DeviceAddress PeerShard::word(int64_t rank, int64_t source) const {
  return block->word(rank, slot, source);
}

PeerMemory::PeerMemory(std::shared_ptr<const Driver> driver, int64_t rank, int64_t world,
                       c10::Device device, int64_t small_block)
    : driver_(std::move(driver)),
      rank_(rank),
      world_(world),
      device_(device),
      small_block_(small_block) {}

PeerMemory::~PeerMemory() {
  try {
    let_go();
  } catch (const std::exception&) {  // a device that is lost is not cleaned up
  }
  by_address_.clear();
  shards_.clear();
  blocks_.clear();
}

void PeerMemory::let_go() {
  const auto now = [] { return std::chrono::steady_clock::now(); };
  // A transfer that waits for a peer that died never ends; its memory stays.
  const auto idle = [&] {
    return std::all_of(streams_.begin(), streams_.end(),
                       [&](Driver::Stream stream) { return driver_->idle(stream); });
  };
  if (!until(now() + kLastWork, idle)) return;
  for (const auto& block : blocks_) block->say_farewell();
  for (const auto& block : blocks_) block->close();
  until(now() + kPatience, [&] {
    return std::all_of(blocks_.begin(), blocks_.end(),
                       [](const auto& block) { return block->free_to_go(); });
  });
  Remains::all().bury();
}

std::shared_ptr<PeerBlock> PeerMemory::new_block(int64_t bytes) const {
  const auto make = [&] { return std::make_shared<PeerBlock>(driver_, bytes, rank_, world_); };
  try {
    return make();
  } catch (const TransportError&) {  // torch's allocator may keep what it does not use
    if (!device_.is_cpu()) c10::getDeviceAllocator(device_.type())->emptyCache();
  }
  try {
    return make();
  } catch (const TransportError& error) {
    throw UserError("[runtime] rank " + std::to_string(rank_) + ": no memory for " +
                    std::to_string(bytes) + " bytes of shards that peers can read: " +
                    error.what() + ". Use more ranks, or compile.gather \"nccl\".");
  }
}

std::shared_ptr<PeerBlock> PeerMemory::block_with(int64_t bytes) {
  const int64_t slots = kPadBytes / (4 * world_);
  for (const auto& block : blocks_) {
    if (block->bytes() - block->used >= bytes && block->next_slot < slots) return block;
  }
  Remains::all().bury();
  int64_t wanted = kPadBytes + bytes;
  if (wanted < small_block_ / 2) wanted = small_block_;
  const auto block = new_block(round_up(wanted, kGranule));
  blocks_.push_back(block);
  at::from_blob(
      block->here(), {kPadBytes}, {1}, [](void*) {},
      c10::TensorOptions().dtype(c10::kByte).device(device_), device_)
      .zero_();
  return block;
}

at::Tensor PeerMemory::allocate(const std::string& name, int64_t numel, bool in_place,
                                c10::TensorOptions options) {
  auto shard = std::make_unique<PeerShard>();
  shard->name = std::make_shared<const std::string>(name);
  shard->bytes = numel * static_cast<int64_t>(options.dtype().itemsize());
  shard->in_place = in_place;
  const int64_t total = in_place ? world_ * shard->bytes : shard->bytes;
  shard->block = block_with(peer_aligned(total));
  PeerBlock& block = *shard->block;
  shard->slot = block.next_slot++;
  shard->offset = block.used;
  block.used += peer_aligned(total);
  char* const start = block.here() + shard->offset;
  at::Tensor tensor = at::from_blob(
      start, {in_place ? world_ * numel : numel}, {1},
      [keep = shard->block](void*) mutable { keep.reset(); }, options.device(device_), device_);
  tensor.zero_();
  by_address_.emplace(start + (in_place ? rank_ * shard->bytes : 0), shard.get());
  shards_.push_back(std::move(shard));
  return tensor;
}

PeerShard* PeerMemory::find(const void* shard) {
  const auto found = by_address_.find(shard);
  return found == by_address_.end() ? nullptr : found->second;
}

at::Tensor PeerMemory::sample(int64_t bytes) const {
  const PeerShard* best = nullptr;
  for (const auto& shard : shards_) {
    const bool fits = shard->bytes >= bytes;
    const bool best_fits = best != nullptr && best->bytes >= bytes;
    const bool better = fits ? !best_fits || shard->bytes < best->bytes
                             : !best_fits && (best == nullptr || shard->bytes > best->bytes);
    if (better) best = shard.get();
  }
  if (best == nullptr) return {};
  return at::from_blob(
      reinterpret_cast<void*>(best->source(rank_)), {std::min(bytes, best->bytes)}, {1},
      [](void*) {}, c10::TensorOptions().dtype(c10::kByte).device(device_), device_);
}

bool PeerMemory::mapped() const {
  return std::all_of(blocks_.begin(), blocks_.end(), [](const auto& b) { return b->mapped(); });
}

void PeerMemory::map(RankMessages& messages) {
  std::string error;
  for (const auto& block : blocks_) {
    if (block->mapped()) continue;
    IpcHandle mine;  // stays zeros if there is none: peers wait for an answer all the same
    try {
      mine = block->handle();
    } catch (const TransportError& failed) {
      error = failed.what();
    }
    const std::vector<std::string> handles =
        messages.exchange({mine.bytes, sizeof(mine.bytes)}, sizeof(mine.bytes));
    try {
      block->open(handles);
    } catch (const TransportError& failed) {
      error = failed.what();
    }
  }
  const std::vector<std::string> errors = messages.errors(error);
  if (std::all_of(errors.begin(), errors.end(), [](const auto& e) { return e.empty(); })) return;
  // A rank without a mapping cannot say that it let go: all do, and wait for each other.
  for (const auto& block : blocks_) block->close();
  messages.errors("");
  for (const auto& block : blocks_) block->forget_peers();
  throw_first(errors);
}

int64_t PeerMemory::bytes() const {
  int64_t bytes = 0;
  for (const auto& block : blocks_) bytes += block->bytes();
  return bytes;
}

}  // namespace deepcompile
