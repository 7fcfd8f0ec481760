// SPDX-License-Identifier: Apache-2.0
#include "passes/memory_use.h"

#include <algorithm>
#include <limits>

#include "base/error.h"

namespace deepcompile {
namespace {

// Far below every real number, and far enough from overflow to be added to.
constexpr Bytes kNone{std::numeric_limits<int64_t>::min() / 4};

}  // namespace

MemoryUse::MemoryUse(const std::vector<Bytes>& bytes) : size_(bytes.size()) {
  DC_CHECK(size_ > 0, "memory without places");
  while (leaves_ < size_) leaves_ *= 2;
  max_.assign(2 * leaves_, kNone);
  rise_.assign(2 * leaves_, Bytes{0});
  std::copy(bytes.begin(), bytes.end(), max_.begin() + static_cast<std::ptrdiff_t>(leaves_));
  for (size_t i = leaves_; i-- > 1;) max_[i] = std::max(max_[2 * i], max_[2 * i + 1]);
}

void MemoryUse::add(size_t first, size_t last, Bytes bytes) {
  if (first < last) add(root(), first, std::min(last, size_), bytes);
}

void MemoryUse::add(Node node, size_t first, size_t last, Bytes bytes) {
  if (last <= node.first || node.last <= first) return;
  if (first <= node.first && node.last <= last) {
    max_[node.at] += bytes;
    rise_[node.at] += bytes;
    return;
  }
  add(left(node), first, last, bytes);
  add(right(node), first, last, bytes);
  max_[node.at] = std::max(max_[2 * node.at], max_[2 * node.at + 1]) + rise_[node.at];
}

Bytes MemoryUse::max(size_t first, size_t last) const {
  return first < last ? max(root(), first, std::min(last, size_)) : kNone;
}

Bytes MemoryUse::max(Node node, size_t first, size_t last) const {
  if (last <= node.first || node.last <= first) return kNone;
  if (first <= node.first && node.last <= last) return max_[node.at];
  return std::max(max(left(node), first, last), max(right(node), first, last)) + rise_[node.at];
}

size_t MemoryUse::fullest() const {
  return *first_above(0, size_, max() - Bytes{1});
}

std::optional<size_t> MemoryUse::first_above(size_t first, size_t last, Bytes limit) const {
  return find(root(), first, std::min(last, size_), limit, true);
}

std::optional<size_t> MemoryUse::last_above(size_t first, size_t last, Bytes limit) const {
  return find(root(), first, std::min(last, size_), limit, false);
}

std::optional<size_t> MemoryUse::find(Node node, size_t first, size_t last, Bytes limit,
                                      bool from_left) const {
  if (last <= node.first || node.last <= first || max_[node.at] <= limit) return std::nullopt;
  if (node.last - node.first == 1) return node.first;
  const Bytes below = limit - rise_[node.at];
  const Node near = from_left ? left(node) : right(node);
  const auto found = find(near, first, last, below, from_left);
  if (found) return found;
  return find(from_left ? right(node) : left(node), first, last, below, from_left);
}

}  // namespace deepcompile
