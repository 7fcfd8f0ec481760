// SPDX-License-Identifier: Apache-2.0
// Small things that are done to lists of ids.
#pragma once

#include <algorithm>
#include <vector>

namespace deepcompile {

template <typename Id>
bool contains(const std::vector<Id>& ids, const Id& id) {
  return std::find(ids.begin(), ids.end(), id) != ids.end();
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
