// SPDX-License-Identifier: Apache-2.0
// Small things that are done to lists of ids.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "base/ids.h"

namespace deepcompile {

template <typename Id>
bool contains(const std::vector<Id>& ids, const Id& id) {
  return std::find(ids.begin(), ids.end(), id) != ids.end();
}

// By index, of `size` in all: whether the id is there.
template <typename Id>
std::vector<bool> marked(const std::vector<Id>& ids, size_t size) {
  std::vector<bool> out(size, false);
  for (const Id id : ids) out[index(id)] = true;
  return out;
}

template <typename T>
void sort_unique(std::vector<T>* list) {
  std::sort(list->begin(), list->end());
  list->erase(std::unique(list->begin(), list->end()), list->end());
}

// Adds the id to the sorted list, or takes it out.
template <typename Id>
void flip(std::vector<Id>* ids, const Id& id) {
  const auto at = std::lower_bound(ids->begin(), ids->end(), id);
  if (at != ids->end() && *at == id) {
    ids->erase(at);
  } else {
    ids->insert(at, id);
  }
}

}  // namespace deepcompile
