// SPDX-License-Identifier: Apache-2.0
#include "analysis/footprint.h"

#include <algorithm>

namespace deepcompile {

ParamFootprint footprint(const StepProgram& program, ParamId id) {
  const Param& param = program.param(id);
  const int64_t shard = shard_numel(param.numel, program.world);
  const int64_t full = shard * program.world;
  // Elements that this rank optimizes: everything if nothing is sharded.
  const int64_t own = param.placement == Placement::kReplicated ? full : shard;
  const int64_t weight_size = element_size(param.dtype);
  const int64_t state_size = std::max<int64_t>(weight_size, element_size(DType::kF32));
  const int64_t reduce_size = element_size(program.reduce_dtype);

  ParamFootprint out;
  out.weights = {weight_size * (param.placement == Placement::kSharded ? shard : full)};
  // One rank's shard is the whole.
  const bool elsewhere = program.world > 1;
  if (param.placement == Placement::kSharded && elsewhere) out.gathered = {weight_size * full};
  // The rows are collected beside the buffer that they then go into.
  const bool rows = program.rows_read(id) > 0;
  if (rows && elsewhere) out.gathered += program.gather_bytes(id);
  if (!param.trainable) return out;
  if (weight_size < state_size) out.master = {state_size * own};
  out.moments = {2 * state_size * own};
  out.reduction_input = rows ? program.reduce_bytes(id) : Bytes{reduce_size * full};
  out.reduction_result = {reduce_size * own};
  const int64_t sum_size = std::max<int64_t>(reduce_size, element_size(DType::kF32));
  out.gradient = {(program.accumulation == 1 ? reduce_size : sum_size) * own};
  out.total = {sum_size * own};
  if (program.boundary && program.accumulation > 1) out.local_sum = {sum_size * full};
  return out;
}

}  // namespace deepcompile
