// SPDX-License-Identifier: Apache-2.0
// How fast this job's links are, measured with all ranks at work at once.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cost/host_beside.h"
#include "runtime/comm/transport.h"
#include "runtime/offload/host_link.h"

namespace deepcompile {

// Per direction ("gather", "reduce", "to_host", "to_device"): (bytes, ns).
using LinkTimes = std::map<std::string, std::vector<std::pair<int64_t, int64_t>>>;

struct LinkMeasures {
  LinkTimes times;
  std::optional<HostBeside> beside;  // none on a CPU, where a copy is done when it returns
};

// The median of `repeats` transfers of each size, and of the slowest rank, so
// that all ranks get the same. Sizes of gathers and reductions are those of
// the whole buffer, of gathers by copy engine at most those of the parameters; with one rank there
// are none. Of the largest size some copies are made in both directions at once too. Collective.
LinkMeasures measure_links(Transport& transport, HostLink& link, int64_t world,
                           c10::ScalarType reduce_dtype, const std::vector<int64_t>& bytes,
                           int64_t repeats);

}  // namespace deepcompile
