// SPDX-License-Identifier: Apache-2.0
// Runtime: what one engine owns on one rank. Parameters and their shards, the
// transport, the optimizer, loaded plans and the calls under way.
//
// Callers: the bindings, without the GIL. Any thread may call; calls run one
// at a time. On a device, the caller's current stream is the compute stream.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "runtime/exec/call_table.h"
#include "runtime/exec/executor.h"
#include "runtime/exec/loaded_plan.h"
#include "runtime/memory/param_store.h"
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
};

// This rank's part of one member, for checkpoints. Tensors are views: writing
// into them and calling masters_changed() restores a state.
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

class Runtime {
 public:
  explicit Runtime(const RuntimeOptions& options);

  void add_param(const ParamSpec& spec);
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
  void broadcast(const at::Tensor& tensor);  // in place, from rank 0
  void barrier();

  int64_t load_plan(std::string_view text, std::vector<std::shared_ptr<RegionCode>> codes);
  std::pair<int64_t, at::Tensor> new_call(int64_t plan);
  // call < 0: nothing is kept for a backward.
  std::vector<RuntimeValue> run(int64_t plan, int64_t section, int64_t call,
                                std::vector<RuntimeValue> inputs);
  StepResult step(int64_t plan, const StepOptions& options);
  void zero_grad();

  std::vector<Piece> pieces();
  void masters_changed();  // weights := masters, on every rank; collective
  // The mean gradient over this rank's part of P, in f32 (f64); undefined if none.
  at::Tensor gradient(const std::string& name);
  int64_t optimizer_steps();
  void set_step(int64_t step);
  void set_member_step(const std::string& member, int64_t step);

  BufferReport buffer_report();
  void trace(bool on);
  std::vector<TraceRecord> records();

 private:
  class Scope;

  template <typename Action>
  void eagerly(const char* what, const std::string& name, Action&& action);
  LoadedPlan& plan_at(int64_t plan);
  const PlanSection& section_at(const LoadedPlan& loaded, int64_t section) const;
  std::shared_ptr<Call> call_for(const LoadedPlan& loaded, SectionKind kind, int64_t call);
  std::vector<RuntimeValue> run_section(LoadedPlan& loaded, size_t section, int64_t call,
                                        std::vector<RuntimeValue> inputs);

  std::recursive_mutex mutex_;
  const RuntimeOptions options_;
  std::unique_ptr<Transport> transport_;  // outlives every transfer below
  ParamStore store_;
  ShardedAdam optimizer_;
  Tracer tracer_;
  Executor executor_;
  std::vector<std::unique_ptr<LoadedPlan>> plans_;
  std::shared_ptr<CallTable> calls_ = std::make_shared<CallTable>();
  std::optional<c10::Stream> compute_;  // the last caller's; none on a CPU
};

}  // namespace deepcompile
