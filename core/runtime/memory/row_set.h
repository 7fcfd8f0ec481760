// SPDX-License-Identifier: Apache-2.0
// Which rows of an embedding the ranks exchange, and rows on their way.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>

namespace deepcompile {

// The rows of a parameter that all ranks read in one micro batch.
struct RowSet {
  int64_t places = 0;  // on each rank; 0: not known yet
  // [world, places] int64, each rank's in rising order, repeated to fill its places;
  // undefined: not known yet.
  at::Tensor numbers;
};

// A gather by rows under way, or over and not yet in the full buffer.
struct ComingRows {
  std::shared_ptr<const RowSet> set;
  at::Tensor rows;  // this rank's places
};

}  // namespace deepcompile
