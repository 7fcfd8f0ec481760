// SPDX-License-Identifier: Apache-2.0
// Machine: what the cost model knows about a cluster, read from a JSON file.
//
// Every number is what the hardware reaches, not what a data sheet promises,
// except the peaks, which an efficiency beside them scales down. The file's
// "notes" say where each number comes from. All bandwidths are bytes per
// second in one direction, as seen by one rank.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>

#include "base/units.h"
#include "cost/host_beside.h"
#include "ir/dtype.h"

namespace deepcompile {

inline constexpr int64_t kMostRanks = 1 << 20;  // that a file may speak of

struct Device {
  std::string name;
  std::map<DType, double> flops;  // peak floating-point operations a second, by element type
  double compute_efficiency = 1;  // fraction of the peak that large kernels reach, in (0, 1]
  double memory_bandwidth = 0;    // peak bytes a second
  double memory_efficiency = 1;   // fraction of it that streaming kernels reach, in (0, 1]
  Bytes memory;                   // what one rank can allocate
  Nanos launch_overhead;          // of one call of a region
};

// How collectives run between ranks. For a collective over w ranks, a
// bandwidth is the payload each rank receives, whole * (w - 1) / w, over time.
struct Link {
  double gather_bandwidth = 0;
  double reduce_bandwidth = 0;
  Nanos latency;                // of one of the w - 1 steps
  double compute_slowdown = 1;  // kernels beside a transfer take this many times as long
};

struct HostLink {
  double to_device_bandwidth = 0;  // all ranks of a node copying at once
  double to_host_bandwidth = 0;
  HostBeside beside;  // keys to_device_beside, to_host_beside; 1 if absent
};

struct Machine {
  std::string name;
  int64_t nodes = 1;
  int64_t ranks_per_node = 1;
  Device device;
  Link intra;                 // between ranks of a node
  std::optional<Link> inter;  // between nodes; present if nodes > 1
  HostLink host;
  std::map<std::string, std::string> notes;

  int64_t ranks() const { return nodes * ranks_per_node; }
};

// `where` names the document in errors. Throws UserError for the first defect:
// malformed JSON, a missing or unknown key, a value out of range.
Machine parse_machine(std::string_view json, const std::string& where = "machine");
Machine load_machine(const std::string& path);

}  // namespace deepcompile
