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

std::vector<Bytes> bytes_during(std::span<const MemoryAt> points) {
  std::vector<Bytes> out;
  out.reserve(points.size() + 1);
  for (const MemoryAt& point : points) out.push_back(point.during);
  return out;
}

MemoryUse::MemoryUse(const std::vector<Bytes>& bytes) : size_(bytes.size()) {
  DC_CHECK(size_ > 0, "memory without places");
  while (leaves_ < size_ + 2) leaves_ *= 2;
  max_.assign(2 * leaves_, kNone);
  rise_.assign(2 * leaves_, Bytes{0});
  std::copy(bytes.begin(), bytes.end(), max_.begin() + static_cast<std::ptrdiff_t>(leaf(0)));
  for (size_t i = leaves_; i-- > 1;) max_[i] = std::max(max_[2 * i], max_[2 * i + 1]);
}

// From the leaves on both sides of the range upwards: what stands between the two is all of it.
void MemoryUse::add(size_t first, size_t last, Bytes bytes) {
  last = std::min(last, size_);
  if (first >= last) return;
  const auto raise = [&](size_t node) {
    max_[node] += bytes;
    rise_[node] += bytes;
  };
  const auto renew = [&](size_t node) {
    max_[node] = std::max(max_[2 * node], max_[2 * node + 1]) + rise_[node];
  };
  size_t left = leaf(first) - 1, right = leaf(last);
  while ((left ^ right) != 1) {
    if (left % 2 == 0) raise(left + 1);
    if (right % 2 == 1) raise(right - 1);
    left /= 2;
    right /= 2;
    renew(left);
    renew(right);
  }
  while ((left /= 2) > 0) renew(left);
}

Bytes MemoryUse::max(size_t first, size_t last) const {
  last = std::min(last, size_);
  if (first >= last) return kNone;
  Bytes in_left = kNone, in_right = kNone;
  size_t left = leaf(first) - 1, right = leaf(last);
  while ((left ^ right) != 1) {
    if (left % 2 == 0) in_left = std::max(in_left, max_[left + 1]);
    if (right % 2 == 1) in_right = std::max(in_right, max_[right - 1]);
    left /= 2;
    right /= 2;
    in_left += rise_[left];
    in_right += rise_[right];
  }
  Bytes out = std::max(in_left, in_right);
  while ((left /= 2) > 0) out += rise_[left];
  return out;
}

Bytes MemoryUse::rises_above(size_t node) const {
  Bytes out;
  while ((node /= 2) > 0) out += rise_[node];
  return out;
}

size_t MemoryUse::fullest() const {
  return *first_above(0, size_, max() - Bytes{1});
}

// The first (or last) leaf below the node with more than `limit`, which leaves out what rises above
// the node. There is one.
size_t MemoryUse::descend(size_t node, Bytes limit, bool first) const {
  while (node < leaves_) {
    limit -= rise_[node];
    const size_t near = 2 * node + (first ? 0 : 1);
    node = max_[near] > limit ? near : (near ^ 1);
  }
  return node - leaf(0);
}

// Upwards as in max. On the near side the lowest node with more is the one, on the far side the
// highest.
std::optional<size_t> MemoryUse::find(size_t first, size_t last, Bytes limit,
                                      bool from_left) const {
  last = std::min(last, size_);
  if (first >= last || max_[1] <= limit) return std::nullopt;
  size_t left = leaf(first) - 1, right = leaf(last);
  Bytes left_limit = limit - rises_above(left), right_limit = limit - rises_above(right);
  size_t far = 0;  // node
  Bytes far_limit;
  while ((left ^ right) != 1) {
    if (left % 2 == 0 && max_[left + 1] > left_limit) {
      if (from_left) return descend(left + 1, left_limit, true);
      far = left + 1;
      far_limit = left_limit;
    }
    if (right % 2 == 1 && max_[right - 1] > right_limit) {
      if (!from_left) return descend(right - 1, right_limit, false);
      far = right - 1;
      far_limit = right_limit;
    }
    left /= 2;
    right /= 2;
    left_limit += rise_[left];
    right_limit += rise_[right];
  }
  if (far == 0) return std::nullopt;
  return descend(far, far_limit, from_left);
}

}  // namespace deepcompile
