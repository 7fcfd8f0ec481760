// SPDX-License-Identifier: Apache-2.0
// Bytes in use by place of a step, while a pass weighs edits: ranges rise and
// fall, and the fullest place is known at once. A tree of maxima: each call
// takes the logarithm of the number of places.
#pragma once

#include <cstddef>
#include <optional>
#include <span>
#include <vector>

#include "analysis/memory_timeline.h"
#include "base/units.h"

namespace deepcompile {

// The bytes at each of some points of a step.
std::vector<Bytes> bytes_during(std::span<const MemoryAt> points);

class MemoryUse {
 public:
  // At least one place.
  explicit MemoryUse(const std::vector<Bytes>& bytes);

  size_t size() const { return size_; }

  // Ranges are [first, last); an empty one is empty.
  void add(size_t first, size_t last, Bytes bytes);
  Bytes max() const { return max_[1]; }
  Bytes max(size_t first, size_t last) const;  // the least number if the range is empty
  Bytes at(size_t place) const { return max_[leaf(place)] + rises_above(leaf(place)); }
  size_t fullest() const;  // the first of them

  // The first and the last place of the range with more than `limit`.
  std::optional<size_t> first_above(size_t first, size_t last, Bytes limit) const {
    return find(first, last, limit, true);
  }
  std::optional<size_t> last_above(size_t first, size_t last, Bytes limit) const {
    return find(first, last, limit, false);
  }

 private:
  // Place 0 has the second leaf, and behind the last place there is another without one: every
  // range has a leaf on either side.
  size_t leaf(size_t place) const { return leaves_ + 1 + place; }
  Bytes rises_above(size_t node) const;
  size_t descend(size_t node, Bytes limit, bool first) const;
  std::optional<size_t> find(size_t first, size_t last, Bytes limit, bool from_left) const;

  size_t size_;
  size_t leaves_ = 1;        // a power of two
  std::vector<Bytes> max_;   // by node, additions to the node's own range included
  std::vector<Bytes> rise_;  // by node: added to all of its range
};

}  // namespace deepcompile
