// SPDX-License-Identifier: Apache-2.0
// Replays: runs of regions that are started again without their host code.
//
// When steps repeat (the same sections of the same plans in the same order), one
// step is recorded: each of its runs, and where the full buffers that it gathered
// lay. In later steps a section that comes in its turn has its buffers at the same
// places, and its runs are launched from the recording, if all they read is where
// it was; what comes from outside is copied there. Anything else runs as ever:
// another order, an open call, a run that cannot be recorded. The kernels are the
// same, and so are the bits.
//
// Not recorded: runs whose outputs the caller gets (he may keep them), that draw
// random numbers, write to their inputs or talk to other ranks, that read more
// than kCopyLimit bytes from outside, that read or make tensors on the host, or
// whose outputs outlive the step, as gradients of one rank that a plan leaves to
// the next forward.
//
// Source of the idea: torch's CUDA graph trees, which record whole graphs. Here a
// plan's transfers stay between the runs, and plans may change.
//
// Callers: the executor and the runtime, under its lock.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <unordered_set>
#include <utility>
#include <vector>

#include "runtime/exec/loaded_plan.h"
#include "runtime/exec/moved_input.h"
#include "runtime/exec/recorder.h"
#include "runtime/memory/memory_meter.h"

namespace deepcompile {

struct ReplayReport {
  bool on = false;         // steps are recorded when they repeat
  int64_t recordings = 0;  // steps that were recorded
  int64_t runs = 0;        // of the recording in use
  int64_t bytes = 0;       // of its memory, but for what tensors hold
  int64_t peak_bytes = 0;  // most that tensors held on the device while it was recorded
  int64_t replayed = 0;    // runs launched from recordings
  int64_t missed = 0;      // recorded runs that ran as ever, as something they read had moved
  std::string moved;       // what that was, when a step last missed a run
  std::string why_not;     // there is no recording
  std::string refused;     // the last run that could not be recorded, and why
};

class Replays {
 public:
  using Values = std::vector<RuntimeValue>;
  // From outside, by one run.
  static constexpr int64_t kCopyLimit = 32 << 20;

  // No recorder: nothing is ever recorded, and `no_recorder` says why.
  Replays(std::shared_ptr<RunRecorder> recorder, const std::string& no_recorder, MemoryMeter& meter,
          c10::Device device);

  // `may_record`: memory is not short and nobody traces.
  void begin_section(const LoadedPlan& loaded, size_t section, size_t open_calls, bool may_record);
  void end_step();
  void leave_step();  // something that is no part of it runs: it is not recorded
  // P's full buffer goes, by no instruction of the step: if the step that is recorded has made it,
  // it is not recorded, as later runs may get its memory while P stays there in other steps.
  void release(const ParamState& param);
  void fail_section();  // nothing more of the step is recorded or replayed
  // The recording goes, as its memory is needed, or its plan does. Tensors in its
  // memory keep it. False if there was none.
  bool drop();
  void forget(int64_t plan);

  // The outputs of the run at this instruction of the section, if it is recorded
  // or launched; the inputs are taken then.
  std::optional<Values> run(size_t instr, const std::vector<LoadedInput>& wanted, Values* inputs,
                            int64_t* workspace);
  // The same value, in memory that stays: callers may keep an output as long as they like.
  RuntimeValue for_caller(const RuntimeValue& output) const;
  // Where the buffer of a gather lies; undefined: anywhere. One that outlives its
  // step has memory of its own: before its turn comes again, the recording's is in use.
  // While the recording lives it is the parameter's place: an evaluation may release it.
  at::Tensor full_buffer(size_t instr, const ParamState& param);

  // Memory of the recording that the allocator counts as free.
  int64_t bytes() const { return report_.bytes; }
  int64_t peak_bytes() const { return report_.peak_bytes; }
  const ReplayReport& report() const { return report_; }

 private:
  using WeakStorage = c10::weak_intrusive_ptr<c10::StorageImpl>;
  using Places = std::map<const c10::StorageImpl*, at::Tensor>;  // whole storages, not their memory
  struct Input {
    bool is_tensor = false;
    const void* data = nullptr;  // where it must be
    std::vector<int64_t> sizes, strides;
    at::Tensor copied;    // defined: copied here first, wherever it is
    RuntimeValue number;  // what it must be, if it is no tensor
    std::optional<MovedInput::How> differs(const RuntimeValue& from) const;
  };
  struct Output {
    int32_t alias = -1;  // of this input
    std::vector<int64_t> sizes, strides;
    int64_t offset = 0;
    RuntimeValue value;  // not an alias; tensors do not own their memory
  };
  struct Origin {  // of an input's memory, which may be gone
    WeakStorage storage;
    c10::ScalarType dtype = c10::ScalarType::Undefined;
  };
  struct Run {
    std::vector<Input> inputs;
    std::vector<Output> outputs;
    std::unique_ptr<RecordedRun> recorded;
    int64_t workspace = -1;
  };
  struct Sighting {  // what a step did
    int64_t plan;
    size_t section;
    size_t open_calls;
    bool operator==(const Sighting&) const = default;
  };
  struct Visit {
    Sighting of;
    std::map<size_t, Run> runs;          // by instruction
    std::map<size_t, at::Tensor> fulls;  // the same; they do not own their memory
  };
  using Maker = std::tuple<int64_t, size_t, size_t>;  // plan, section, instruction
  struct Recording {
    std::shared_ptr<void> pool;
    std::vector<std::unique_ptr<Visit>> visits;
    std::vector<std::pair<Maker, WeakStorage>> made;  // by runs, and the gathers' buffers
    std::map<ParamState*, WeakStorage> read;  // whose full buffers runs read, the first ones
    std::vector<ParamState*> placed;          // that have a place for their full buffers
    std::unordered_set<const void*> known;    // storages whose places the recording fixes
    std::unordered_set<const void*> ours;     // of those, and of what has their places, its memory
  };
  enum class Mode { kPlain, kRecording, kReplaying };

  void start_step(const Sighting& first, bool may_record);
  void finish_recording();
  bool find_lasting();
  void keep_places();
  void give_up(const std::string& why);

  Maker maker_of(size_t instr) const { return {loaded_->id, section_, instr}; }
  const PlanRegion& region_at(size_t instr) const;
  bool is_recordable(size_t instr, const std::vector<LoadedInput>& wanted,
                     const Values& inputs) const;
  void note_reads(const std::vector<LoadedInput>& wanted);
  bool has_its_place(const LoadedInput& wanted, const at::Tensor& tensor) const;
  std::optional<Values> record(size_t instr, const std::vector<LoadedInput>& wanted, Values* inputs,
                               int64_t* workspace);
  Input input_rule(const LoadedInput& wanted, RuntimeValue* input);
  static Origin origin_of(const RuntimeValue& input);
  Output output_rule(size_t instr, const RuntimeValue& output, const std::vector<Origin>& inputs,
                     Places* shared);
  bool fits(size_t instr, const Run& run, const Values& inputs);
  std::string name_of(size_t instr, size_t input) const;
  static Values launch(const Run& run, Values* inputs);
  // The same elements without their memory. Offsets are those in the tensor's storage, which
  // tensors of one storage share: a run may hand on a view of another part of it.
  at::Tensor at_place(const at::Tensor& tensor, Places* shared) const;
  at::Tensor to_keep(const at::Tensor& tensor, Places* shared);  // the same, for later steps
  at::Tensor memory_like(const at::Tensor& tensor);              // of the pool

  std::shared_ptr<RunRecorder> recorder_;
  MemoryMeter& meter_;
  c10::Device device_;
  Mode mode_ = Mode::kPlain;
  bool in_step_ = false;
  const LoadedPlan* loaded_ = nullptr;  // of the section under way
  size_t section_ = 0;
  Visit* visit_ = nullptr;  // null: the section has no part in the recording
  size_t next_ = 0;         // visit
  std::unique_ptr<Recording> recording_;
  std::vector<Sighting> seen_, last_;
  int64_t alike_ = 0;                    // steps in a row that did the same
  int64_t wanted_ = 1;                   // of them, before one is recorded
  int64_t missed_ = 0;                   // in this step
  int64_t bad_steps_ = 0;                // in a row in which something was missed
  MovedInput moved_;                     // what a step missed first
  int64_t given_up_ = 0;                 // recordings
  std::set<const RegionCode*> refused_;  // cannot be recorded
  std::set<Maker> lasting_;              // what they make outlives a step
  ReplayReport report_;
};

}  // namespace deepcompile
