// SPDX-License-Identifier: Apache-2.0
// PeerMemory: device memory that all ranks of one node can read, and words in
// it by which they tell each other what they have done.
//
// Every rank allocates the same shards in the same order, so the layout is the
// same everywhere and an offset means the same shard. Memory comes in blocks;
// each begins with a pad of words: one for every (shard, source rank), which
// the source writes and the block's owner waits for. A wait is therefore on
// local memory, and a signal is one write to each peer.
//
// Blocks are mapped into the peers' address space when `map` is called, by
// handles exchanged over the process group. A rank that lets go of its peers'
// blocks tells their owners; an owner gives a block's memory back only when all
// peers have, as the driver demands. It waits a second for them and otherwise
// leaves the block to whoever makes or drops an engine next.
//
// Callers: the copy engine transport, under the runtime's lock.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "runtime/comm/driver.h"
#include "runtime/comm/rank_messages.h"

namespace deepcompile {

// Bytes of memory that peers read or write, rounded up to where the next may begin.
int64_t peer_aligned(int64_t bytes);

class PeerBlock;

// One shard's place in every rank's memory.
struct PeerShard {
  std::shared_ptr<const std::string> name;
  std::shared_ptr<PeerBlock> block;
  int64_t slot = 0;       // its words in the block's pad
  int64_t offset = 0;     // bytes from the block's start, of rank 0's shard
  int64_t bytes = 0;      // of one shard
  bool in_place = false;  // the shards lie one behind another, else all at `offset`
  // Gathers of it so far, the same number on every rank, and the last of them
  // that all peers are known to have ended.
  uint32_t round = 0;
  uint32_t settled = 0;
  uint64_t given = 0;  // the number of the last among all transfers that streams were given

  // Of `owner`'s shard, in that rank's own memory, as this rank sees it.
  DeviceAddress source(int64_t owner) const;
  // The word that `source` writes on `rank`.
  DeviceAddress word(int64_t rank, int64_t source) const;
};

class PeerMemory {
 public:
  // `small_block`: bytes of the blocks that shards smaller than half of one share.
  PeerMemory(std::shared_ptr<const Driver> driver, int64_t rank, int64_t world, c10::Device device,
             int64_t small_block = 64 << 20);
  // Lets go of the peers' memory, once the stream is done with it.
  ~PeerMemory();

  // Zeros: one shard, or if `in_place` one for each rank behind another. The
  // tensor keeps its memory alive.
  at::Tensor allocate(const std::string& name, int64_t numel, bool in_place,
                      c10::TensorOptions options);
  // By the address of this rank's shard; null if it is not here.
  PeerShard* find(const void* shard);
  // The first `bytes` of the smallest shard that has them, else the largest
  // shard, as bytes; undefined if there is none. Not for writing.
  at::Tensor sample(int64_t bytes) const;

  bool mapped() const;
  // Exchanges what was allocated since. Collective; the host waits. Throws
  // TransportError on every rank if one cannot map a peer's memory.
  void map(RankMessages& messages);
  // Streams to wait for before the peers' memory is let go.
  void used_on(Driver::Stream stream) { streams_.insert(stream); }
  int64_t bytes() const;

 private:
  std::shared_ptr<PeerBlock> new_block(int64_t bytes) const;
  std::shared_ptr<PeerBlock> block_with(int64_t bytes);
  void let_go();

  std::shared_ptr<const Driver> driver_;
  int64_t rank_;
  int64_t world_;
  c10::Device device_;
  int64_t small_block_;
  std::set<Driver::Stream> streams_;
  std::vector<std::shared_ptr<PeerBlock>> blocks_;
  // In the order of their allocation, which is the same on every rank; addresses are not.
  std::vector<std::unique_ptr<PeerShard>> shards_;
  std::map<const void*, PeerShard*> by_address_;
};

}  // namespace deepcompile
