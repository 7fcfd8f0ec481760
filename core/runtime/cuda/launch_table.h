// SPDX-License-Identifier: Apache-2.0
// What the kernels' tables have in common: one launch works on many arrays, and
// a block finds its own in the table, which is the launch's parameter.
#pragma once

#include <cstdint>

#include "runtime/cuda/kernels.h"
#include "runtime/cuda/numbers.h"

namespace deepcompile::kernels {

constexpr int64_t kMaxBlocks = 0x7fffffff;  // of one launch
constexpr int kMaxTable = 4096;             // bytes of a launch's parameters

// Entry e has the blocks [first_block[e], first_block[e + 1]): the entry of `block`.
DC_HOST_DEVICE int entry_of(const uint32_t* first_block, int entries, uint32_t block) {
  int low = 0, high = entries;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (first_block[middle] <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Spreads items 0 to count - 1 over as few launches as `most` entries and kMaxBlocks
// blocks each allow; ends with the first that is not 0. blocks_of(item): its blocks, 0 to
// leave it out. put(item, entry): into the table, whose first_block has room for most + 1.
// launch(entries, blocks) -> int.
template <typename BlocksOf, typename Put, typename Launch>
int for_each_launch(int64_t count, int most, uint32_t* first_block, BlocksOf&& blocks_of, Put&& put,
                    Launch&& launch) {
  int entries = 0;
  int64_t blocks = 0;
  const auto flush = [&]() -> int {
    if (entries == 0) return 0;
    first_block[entries] = static_cast<uint32_t>(blocks);
    const int status = launch(entries, static_cast<uint32_t>(blocks));
    entries = 0;
    blocks = 0;
    return status;
  };
  for (int64_t i = 0; i < count; ++i) {
    const int64_t more = blocks_of(i);
    if (more == 0) continue;
    if (entries == most || blocks + more > kMaxBlocks) {
      const int status = flush();
      if (status != 0) return status;
    }
    first_block[entries] = static_cast<uint32_t>(blocks);
    put(i, entries++);
    blocks += more;
  }
  return flush();
}

// Bytes of an element of a deepcompile_cuda_type; 0 for any other number.
inline int64_t type_bytes(int type) {
  switch (type) {
    case DEEPCOMPILE_CUDA_F32:
      return 4;
    case DEEPCOMPILE_CUDA_BF16:
    case DEEPCOMPILE_CUDA_F16:
      return 2;
    case DEEPCOMPILE_CUDA_F64:
      return 8;
    default:
      return 0;
  }
}

inline bool usable_pointer(const void* pointer, int64_t bytes) {
  return pointer != nullptr &&
         reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

}  // namespace deepcompile::kernels
