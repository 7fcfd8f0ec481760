// SPDX-License-Identifier: Apache-2.0
// Runtime: what one engine owns on one rank. Parameters and their shards, the
// transport, the optimizer, loaded plans and the calls under way.
//
// Callers: the bindings, without the GIL. Any thread may call; calls run one
// at a time. On a device, the caller's current stream is the compute stream.
#pragma once

#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "runtime/comm/copy_engine.h"
#include "runtime/comm/flag_exchange.h"
#include "runtime/comm/link_measure.h"
#include "runtime/exec/call_table.h"
#include "runtime/exec/executor.h"
#include "runtime/exec/loaded_plan.h"
#include "runtime/exec/relief.h"
#include "runtime/exec/replays.h"
#include "runtime/memory/memory_meter.h"
#include "runtime/memory/param_store.h"
#include "runtime/offload/state_mover.h"
#include "runtime/offload/value_mover.h"
#include "runtime/optimizer/sharded_adam.h"
#include "runtime/trace.h"

namespace deepcompile {

struct RuntimeOptions {
  std::string group_name;  // of the c10d process group; empty for one rank without one
  int64_t rank = 0;
  int64_t world = 1;
  c10::Device device = c10::Device(c10::kCPU);
  c10::ScalarType reduce_dtype = c10::kFloat;  // element type on the wire of reductions
  double clip = 0.0;                           // largest global gradient norm; 0: no clipping
  int64_t accumulation = 1;                    // micro-steps a step
  double timeout_s = 600.0;                    // for one transfer
  CopyEngineOptions copy_engine;
  std::shared_ptr<RunRecorder> recorder;  // null: regions always run through their host code
  std::string no_recorder;                // why it is null, for reports
};

// This rank's part of one member, for checkpoints. Tensors are views: writing
// into them and calling masters_changed() restores a state. Master and states
// are on the host where a plan left them there.
struct Piece {
  std::string param;
  std::string member;
  int64_t start = 0;  // elements [start, stop) of the flattened member
  int64_t stop = 0;
  at::Tensor weight;
  at::Tensor master;  // undefined, like the states, if the parameter is frozen
  at::Tensor exp_avg;
  at::Tensor exp_avg_sq;
  int64_t step = 0;
};

// Who computes an update and the gradient norm: deepcompile_cuda (the library
// beside this one), torch, or cpu (this library itself).
struct KernelReport {
  std::string adamw;
  std::string norm;
  std::string library;  // deepcompile_cuda's path, or why it is not used
};

class Runtime {
 public:
  explicit Runtime(const RuntimeOptions& options);

  // What they go over, and why.
  const Route& gathers() const { return gathers_; }
  const Route& reductions() const { return reductions_; }
  // Device memory in use that torch's allocator does not count.
  int64_t outside_bytes();

  void add_param(const ParamSpec& spec);
  // Before a plan by rows is loaded: the c10d group, with a backend for CPU tensors
  // and this runtime's ranks, over which ranks tell each other how many rows they read.
  void exchange_rows_over(const std::string& group_name);
  void set_hyper(const std::string& member, const Hyper& hyper);

  // Outside plans: eager modules, checkpoints, reading a parameter.
  void gather(const std::vector<std::string>& names);
  void wait(const std::vector<std::string>& names);
  void release(const std::vector<std::string>& names);
  void reduce(const std::string& name,
              const std::vector<std::pair<std::string, at::Tensor>>& grads);
  void accumulate(const std::string& name);
  bool is_whole(const std::string& name);
  // The user changed whole parameters in place, equally on every rank: keep it.
  void store(const std::vector<std::string>& names);
  // Whether the user changed a member in place since its last update and store.
  bool is_written(const std::string& member);
  void broadcast(const at::Tensor& tensor);  // in place, from rank 0
  void barrier();

  int64_t load_plan(std::string_view text, std::vector<std::shared_ptr<RegionCode>> codes);
  // Freed at once, or when its last open call is over.
  void unload_plan(int64_t plan);
  std::pair<int64_t, at::Tensor> new_call(int64_t plan);
  // call < 0: nothing is kept for a backward.
  std::vector<RuntimeValue> run(int64_t plan, int64_t section, int64_t call,
                                std::vector<RuntimeValue> inputs);
  StepResult step(int64_t plan, const StepOptions& options);
  void zero_grad();
  // Drops the step's gradients, and that some parameters had their update early: for whoever
  // overwrites weights and states next.
  void abandon_step();
  // Before each micro batch: whether its backward completes the step's gradients.
  void set_last_micro_batch(bool last);
  // Applies deferred updates and makes parameters that are kept whole, whole
  // again. Collective.
  void settle();

  std::vector<Piece> pieces();
  void masters_changed();  // weights := masters, on every rank; collective
  // The mean gradient over this rank's part of P, in f32 (f64); undefined if none.
  at::Tensor gradient(const std::string& name);
  int64_t optimizer_steps();
  void set_step(int64_t step);
  void set_member_step(const std::string& member, int64_t step);

  // The largest of all ranks' flags, read two shares later. `share` is collective.
  void share(int64_t flag);
  int64_t shared();
  LinkMeasures measure_links(const std::vector<int64_t>& bytes, int64_t repeats);  // collective

  // Whose kernels serve this runtime's device.
  KernelReport kernels();
  ReplayReport replays();
  // What was moved to the host for want of memory, since the last call.
  ReliefReport relieved();
  // Behave as if the device had `bytes` (0: as it is).
  void limit_bytes(int64_t bytes);
  int64_t peak_bytes();
  void reset_peak_bytes();
  BufferReport buffer_report();
  void trace(bool on);
  std::vector<TraceRecord> records();

 private:
  class Scope;

  Runtime(const RuntimeOptions& options, TransportChoice chosen);
  template <typename Action>
  void eagerly(const char* what, const std::string& name, Action&& action);
  template <typename Action>
  void eagerly(const char* what, ParamState& param, Action&& action);
  // The caller works on another stream than before.
  void follow_stream(c10::Stream now);
  void settle_here();    // what needs no other rank
  void store_written();  // between steps, by the user
  // Of gradients that are summed on ranks alone, where no reduction of the step took them.
  void reduce_local_sums();
  // `call`: an open call keeps its plan after unload_plan; -1 for none.
  std::shared_ptr<LoadedPlan> plan_at(int64_t plan, int64_t call = -1);
  const PlanSection& section_at(const LoadedPlan& loaded, int64_t section) const;
  std::shared_ptr<Call> call_for(const LoadedPlan& loaded, SectionKind kind, int64_t call);
  std::vector<RuntimeValue> run_section(LoadedPlan& loaded, size_t section, int64_t call,
                                        std::vector<RuntimeValue> inputs);

  std::recursive_mutex mutex_;
  const RuntimeOptions options_;
  const Route gathers_;
  const Route reductions_;
  std::unique_ptr<Transport> transport_;  // outlives every transfer below
  HostLink link_;
  FlagExchange flags_;
  ParamStore store_;
  StateMover states_;
  ValueMover values_;
  ShardedAdam optimizer_;
  std::shared_ptr<CallTable> calls_ = std::make_shared<CallTable>();
  Relief relief_;
  MemoryMeter meter_;
  Replays replays_;
  Tracer tracer_;
  int64_t updates_ = 0;  // steps that changed parameters
  Executor executor_;
  int64_t next_plan_ = 0;
  std::map<int64_t, std::shared_ptr<LoadedPlan>> plans_;  // by id
  std::optional<c10::Stream> compute_;                    // the last caller's; none on a CPU
};

}  // namespace deepcompile
