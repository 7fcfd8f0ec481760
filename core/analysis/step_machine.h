// SPDX-License-Identifier: Apache-2.0
// What each instruction of a step does, whatever it costs: which buffers come
// and go, what has to be computed, copied and waited for. Memory timeline and
// simulator listen to it, so both follow one set of rules.
//
// Nothing here depends on time: an instruction's effect follows from those
// before it. The forward and backward sections run once a micro batch, the
// update once; what a step leaves whole, on the host or deferred is where the
// next one starts. At the very start parameters that are whole or replicated
// are valid, sharded ones are not, all states are on the device and no
// gradient is there; in a program that reduces nothing, gradients are another
// program's and every update has one to apply.
//
// Section outputs belong to the caller: he keeps a forward's until its
// backward is over, the others no longer than the section.
#pragma once

#include <cstdint>
#include <vector>

#include "analysis/footprint.h"
#include "analysis/liveness.h"
#include "ir/program.h"

namespace deepcompile {

// What a buffer is for.
enum class MemoryPart : uint8_t {
  kWeights,     // shards, or everything if whole or replicated
  kMasters,     // fp32 copies that the optimizer works on
  kMoments,     // Adam's averages
  kGathered,    // full buffers of sharded parameters
  kReductions,  // what reductions send and receive; a gradient read after its reduce counts twice
  kGradients,   // gradient shards, and full-size local sums
  kValues,
  kWorkspace,
};
inline constexpr int kMemoryPartCount = 8;

// Something that can be in flight: one per parameter and kind, one per value.
using TransferSlot = uint32_t;

// Called in the order in which compute reaches things.
class StepEvents {
 public:
  virtual ~StepEvents() = default;

  virtual void begin_section(SectionKind) {}
  virtual void begin(size_t section, size_t instr, int64_t micro_batch) = 0;
  virtual void memory(MemoryPart part, int64_t bytes) = 0;  // allocated; negative: freed
  // Compute runs `op` of this instruction's operand: the instruction itself, a
  // deferred update at a gather, or (kReduce) the sum on this rank alone.
  virtual void kernel(Op op, const Instr& instr) = 0;
  // Compute copies gradients into the staging buffer of this reduce.
  virtual void stage(const Instr&) {}
  // A copy is issued; `mark` says what it is called from now on.
  virtual void transfer(Resource queue, Op op, const Instr& instr) = 0;
  virtual void mark(TransferSlot slot) = 0;
  virtual void wait(TransferSlot slot) = 0;  // compute stands still until it is done
  virtual void end() = 0;                    // of the instruction; what dies with it is freed
};

class StepMachine {
 public:
  // `program` has passed verify, and outlives the machine.
  explicit StepMachine(const StepProgram& program);

  // One step, from where the last one ended, with this many micro batches.
  void run(StepEvents& events, int64_t micro_batches);

  // Whether the last step ended as it began: the next will be like it.
  bool settled() const { return before_ == params_; }

  // What is on the device before the first step.
  const std::vector<ParamFootprint>& footprints() const { return footprints_; }
  size_t slots() const { return params_.size() * kSlotsPerParam + values_.size(); }

 private:
  enum class Home : uint8_t { kDevice, kLeaving, kHost, kComing };
  enum Slot : uint32_t { kWholeSlot, kReducedSlot, kStatesSlot, kSlotsPerParam };

  struct ParamState {
    bool whole = false;      // the full buffer is valid, or will be when its gather is done
    bool allocated = false;  // the full buffer of a sharded parameter
    bool gradient = false;   // the shard
    bool sum = false;        // the full-size sum on this rank
    bool deferred = false;
    Home states = Home::kDevice;
    bool operator==(const ParamState&) const = default;
  };
  struct ValueState {
    int64_t bytes = 0;
    Home home = Home::kDevice;
    bool alive = false;   // in the environment of its graph
    bool held = false;    // by the caller
    bool shared = false;  // both hold the same tensor
  };
  struct SectionPlan {
    std::vector<ValueId> dead_inputs;  // that no instruction could free
    std::vector<ValueId> held;         // outputs that the caller keeps
    std::vector<ValueId> dropped;      // outputs, also of its forward, that he gives up
  };

  void plan_sections();
  void run_section(size_t at, int64_t micro_batch);
  void step(const Instr& instr);
  void step_values(const Instr& instr);
  void gather(const Instr& instr);
  void release(const Instr& instr);
  void reduce(const Instr& instr);
  void accumulate(const Instr& instr);
  void update(const Instr& instr);
  void apply_update(const Instr& instr);
  void run_region(const Region& region, const Instr& instr);
  void move_states(const Instr& instr);
  void states_memory(const Instr& instr, int sign);

  int64_t renew(ValueId id);  // bytes that are to be allocated
  int64_t drop(ValueId id);   // bytes that are to be freed
  void make(ValueId id);
  void free(ValueId id);
  void hold(ValueId id);
  void give_up(ValueId id);

  bool is_in_place(const Instr& instr) const;
  // What a reduction brings back; on one rank it is what was sent.
  int64_t result_bytes(const Instr& instr) const {
    return program_.world == 1 ? 0 : bytes(instr).reduction_result.value;
  }
  ParamState& state(const Instr& instr) { return params_[index(*instr.param)]; }
  const ParamFootprint& bytes(const Instr& instr) const { return footprints_[index(*instr.param)]; }
  TransferSlot slot(const Instr& instr, Slot kind) const {
    return index(*instr.param) * kSlotsPerParam + kind;
  }
  TransferSlot slot(ValueId id) const {
    return static_cast<uint32_t>(params_.size()) * kSlotsPerParam + index(id);
  }

  const StepProgram& program_;
  Liveness liveness_;
  std::vector<ParamFootprint> footprints_;
  std::vector<SectionPlan> sections_;
  bool sums_locally_ = false;      // until the last micro batch
  std::vector<bool> adopts_;       // by parameter: the reduction's result becomes the gradient
  bool foreign_gradients_ = true;  // the program reduces nothing
  std::vector<ParamState> params_, before_;
  std::vector<ValueState> values_;

  StepEvents* events_ = nullptr;  // during run()
  SectionKind kind_ = SectionKind::kForward;
  bool last_ = false;          // micro batch
  bool stages_after_ = false;  // the reduction takes its gradient's buffer over
};

}  // namespace deepcompile
