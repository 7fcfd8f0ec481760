// SPDX-License-Identifier: Apache-2.0
// Cost models: how long an instruction takes when nothing disturbs it.
//
// The simulator asks an Estimator and knows nothing of machines. MachineCosts
// is the one made from a Machine:
//   run         the measured time if there is one, else the roofline
//               max(flops / rate, moved / bandwidth), plus a launch
//   gather      w - 1 latencies plus whole * (w - 1) / w over the link's bandwidth;
//               across nodes see collective_time
//   reduce      the same with elements of reduce_dtype; a replicated parameter
//               pays a reduce-scatter and an all-gather
//   by rows     a gather is an all-gather of row numbers and a reduce-scatter of the rows that
//               all ranks read, a reduction an all-gather of these
//   accumulate, norm, update   device memory traffic over bandwidth, plus a launch; so does the
//               copy of a gradient into a reduction's buffer, with a launch a member; of a
//               parameter that several graphs reduce as if one did
//   offload_states, reload_states, offload, reload   bytes over the host link's
//               bandwidth in that direction, plus a launch a tensor
// What only waits or gives memory back is free. MeasuredCosts (measured_costs.h)
// puts measurements in the place of these where there are any.
#pragma once

#include <optional>

#include "base/units.h"
#include "cost/host_beside.h"
#include "cost/machine.h"
#include "ir/program.h"

namespace deepcompile {

class Estimator {
 public:
  virtual ~Estimator() = default;

  // Undisturbed duration of one instruction of `program`.
  virtual Nanos duration(const StepProgram& program, const Instr& instr) const = 0;

  // Adding a rank's own gradients to its full-size sum of them, where a step
  // reduces once for all micro batches (StepProgram::boundary). If nothing
  // better is known: what an accumulate takes.
  virtual Nanos local_sum(const StepProgram& program, ParamId id) const {
    return duration(program, {Op::kAccumulate, id, std::nullopt, {}});
  }

  // Copying P's gradients into the buffer that its reduction reads, where the gradient is not one
  // tensor of that size and element type; nothing if nobody knows.
  virtual Nanos staging(const StepProgram&, ParamId) const { return {}; }

  // From the end of a section's work to the start of the next one's, when nothing is waited for:
  // the user's code, autograd, the call. Of the section that begins; nothing if nobody knows.
  virtual Nanos section_overhead(const StepProgram&, SectionKind) const { return {}; }

  // Kernels take this many times as long while the link is busy; at least 1.
  virtual double compute_slowdown(const StepProgram& program) const = 0;

  // What each direction of the host link keeps of its speed while the other one is busy; all of
  // it if nobody knows.
  virtual HostBeside host_beside(const StepProgram&) const { return {}; }
};

class MachineCosts : public Estimator {
 public:
  // Keeps its own copy of the machine.
  explicit MachineCosts(Machine machine) : machine_(std::move(machine)) {}

  // All throw UserError if the program's world does not fit on the machine.
  Nanos duration(const StepProgram& program, const Instr& instr) const override;
  Nanos local_sum(const StepProgram& program, ParamId id) const override;
  Nanos staging(const StepProgram& program, ParamId id) const override;
  double compute_slowdown(const StepProgram& program) const override;
  HostBeside host_beside(const StepProgram&) const override { return machine_.host.beside; }

  // Time of a region without its measured time.
  Nanos roofline(const StepProgram& program, const Region& region) const;

  const Machine& machine() const { return machine_; }

 private:
  Nanos memory_time(double bytes) const;
  Nanos gather_time(const StepProgram& program, ParamId id) const;
  Nanos reduce_time(const StepProgram& program, ParamId id) const;
  Nanos accumulate_time(const StepProgram& program, ParamId id) const;
  Nanos norm_time(const StepProgram& program) const;
  Nanos update_time(const StepProgram& program, ParamId id) const;
  Nanos states_time(const StepProgram& program, const Instr& instr) const;
  Nanos values_time(const StepProgram& program, const Instr& instr) const;
  Nanos host_time(bool to_host, Bytes bytes, int64_t tensors) const;

  Machine machine_;
};

// Bytes of this rank's gradient shards: what the norm reads.
Bytes norm_bytes(const StepProgram& program);

enum class Collective : uint8_t { kAllGather, kReduceScatter };

// Time of one collective over `world` ranks; `whole` is the unsharded size.
//
// Ranks fill nodes one after the other. Across n nodes of g ranks each rank
// first exchanges its piece with its like in the other nodes, whole * (n - 1)
// / (n * g), then within its node, whole * (g - 1) / g. The two are pipelined:
// the slower one sets the pace, the latencies of both add.
Nanos collective_time(const Machine& machine, Collective kind, int64_t world, Bytes whole);

// How many ranks of each node take part. Throws UserError if `world` ranks
// cannot be laid out on the machine.
struct Layout {
  int64_t nodes = 1;
  int64_t ranks_per_node = 1;
};
Layout layout(const Machine& machine, int64_t world);

// Fills in the time of every region that has none; measured times stay.
// Returns the number of regions filled.
int fill_analytic_times(StepProgram& program, const Machine& machine);

}  // namespace deepcompile
