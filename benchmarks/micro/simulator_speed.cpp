// SPDX-License-Identifier: Apache-2.0
// How long the analyses take that a planner calls again and again, on a step
// the size of Llama-3-70B: 80 layers, 9 regions a layer forward and as many
// backward, 560 large parameters. Prints the median and the fastest of the
// calls, once for a plain ZeRO-3 plan and once for one that defers updates,
// recomputes, and moves states and activations to the host and back; then how
// long `auto` takes to plan that step under budgets from loose to tight, and to
// plan it again while that plan holds. It asks side by side what it can, so the
// processors' time is given too.
//
//   cmake -S . -B build -DDEEPCOMPILE_BUILD_BENCHMARKS=ON && cmake --build build
//   build/benchmarks/micro/simulator_speed python/deepcompile/machines/4xh200.json [layers]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "analysis/liveness.h"
#include "analysis/memory_timeline.h"
#include "base/error.h"
#include "ir/text.h"
#include "ir/verifier.h"
#include "passes/auto/plan.h"
#include "passes/pipeline.h"
#include "sim/simulator.h"

namespace deepcompile {
namespace {

constexpr int kRegionsPerLayer = 9;
constexpr int kParamsPerLayer = 7;
constexpr int kSavedPerRegion = 3;
constexpr int kCalls = 50;

// Where the memory goes: mostly to optimizer states, or mostly to activations.
struct Sizes {
  int64_t numel;  // of a parameter, bf16
  int64_t saved;  // MiB of each saved value
};
constexpr Sizes kStates{134217728, 8}, kActivations{33554432, 40};

// A chain of regions; the first seven of a layer have a parameter each.
std::string step_text(int layers, const Sizes& sizes) {
  const int regions = layers * kRegionsPerLayer;
  std::string params, values, tables, forward, backward;
  for (int i = 0; i < regions; ++i) {
    const std::string n = std::to_string(i);
    std::string param, grad, saved;
    if (i % kRegionsPerLayer < kParamsPerLayer) {
      params += "param w." + n + " bf16 " + std::to_string(sizes.numel) + "\n";
      values += "value g." + n + " " + std::to_string(sizes.numel * 2) + "B grad=w." + n + "\n";
      param = ", w." + n;
      grad = ", g." + n;
    }
    for (int k = 0; k < kSavedPerRegion; ++k) {
      const std::string name = "s." + n + "." + std::to_string(k);
      values += "value " + name + " " + std::to_string(sizes.saved) + "MiB\n";
      saved += ", " + name;
    }
    values += "value h." + n + " 16MiB\nvalue d." + n + " 16MiB\n";
    const std::string before = i == 0 ? "x" : "h." + std::to_string(i - 1);
    const std::string after = i + 1 == regions ? "t" : "d." + std::to_string(i + 1);
    tables += "region f." + n + " code=" + std::to_string(i % kRegionsPerLayer) +
              " workspace=64MiB time=300us (" + before + param + ", norms) -> (h." + n + saved +
              ")\nregion b." + n + " code=20 workspace=64MiB time=600us (" + after + param + saved +
              ") -> (d." + n + grad + ")\n";
    forward += "  run f." + n + "\n";
    backward = "  run b." + n + "\n" + backward;
  }
  return "step llama world=4\nparam norms bf16 1310720 whole frozen\n" + params +
         "value x 16MiB\nvalue t 16MiB\n" + values + tables + "forward 0 (x) -> (h." +
         std::to_string(regions - 1) + ")\n" + forward + "end\nbackward 0 (t) -> ()\n" + backward +
         "end\nupdate\nend\n";
}

size_t layer_of(const StepProgram& program, const Instr& instr) {
  if (instr.param) return (index(*instr.param) - 1) / kParamsPerLayer;
  const size_t region = index(*instr.region) / 2;  // forward and backward take turns
  return std::min(region, program.regions.size() / 2 - 1) / kRegionsPerLayer;
}

// Every update deferred. Layers take turns: one runs all its regions again in
// the backward, the next has its states and activations on the host.
void use_everything(StepProgram& program) {
  for (Section& section : program.sections) {
    std::vector<Instr> out;
    const auto add = [&](Op op, const Instr& of, std::vector<ValueId> values = {}) {
      const bool with_values = !values.empty();
      out.push_back({op, with_values ? std::nullopt : of.param, std::nullopt, std::move(values)});
    };
    const bool forward = section.kind == SectionKind::kForward;
    const bool update = section.kind == SectionKind::kUpdate;
    for (const Instr& instr : section.instrs) {
      const bool host = instr.op != Op::kNorm && layer_of(program, instr) % 2 == 1;
      const bool run = instr.op == Op::kRun;
      const size_t region = run ? index(*instr.region) & ~size_t{1} : 0;  // the forward's
      const auto saved = [&] { return std::vector<ValueId>{program.regions[region].outputs[1]}; };
      const RegionId again{static_cast<uint32_t>(region)};
      if (forward && host && instr.op == Op::kGather) {
        add(Op::kReloadStates, instr);
        add(Op::kAwaitStates, instr);
      }
      if (run && !forward && host) add(Op::kReload, instr, saved());
      if (run && !forward && host) add(Op::kAwait, instr, saved());
      if (run && !forward && !host) out.push_back({Op::kRun, std::nullopt, again, {}});
      out.push_back(instr);
      if (run && forward && host) add(Op::kOffload, instr, saved());
      if (run && forward && host) add(Op::kEvict, instr, saved());
      if (!update || instr.op != Op::kUpdate) continue;
      out.back().op = Op::kDefer;
      if (host) add(Op::kOffloadStates, instr);
      if (host) add(Op::kEvictStates, instr);
    }
    section.instrs = std::move(out);
  }
}

void report(const char* what, int calls, const std::function<void()>& call) {
  std::vector<double> times, of_processors;
  for (int i = 0; i < calls; ++i) {
    const std::clock_t used = std::clock();
    const auto start = std::chrono::steady_clock::now();
    call();
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
    times.push_back(took.count());
    of_processors.push_back(static_cast<double>(std::clock() - used) * 1e3 / CLOCKS_PER_SEC);
  }
  const auto middle = static_cast<size_t>(calls) / 2;
  std::sort(times.begin(), times.end());
  std::sort(of_processors.begin(), of_processors.end());
  std::printf("  %-21s %7.3f ms   (fastest %.3f, processors %.3f)\n", what, times[middle], times[0],
              of_processors[middle]);
}

void measure(const char* title, const StepProgram& program, const Estimator& costs) {
  size_t instrs = 0;
  for (const Section& section : program.sections) instrs += section.instrs.size();
  const SimSummary step = simulate_summary(program, costs);
  std::printf("%s: %zu instructions, simulated step %s, peak %s\n", title, instrs,
              pretty(step.time).c_str(), pretty(step.peak).c_str());
  report("copy", kCalls, [&] { StepProgram copy = program; });
  report("verify", kCalls, [&] { verify(program); });
  report("liveness", kCalls, [&] { analyze_liveness(program); });
  report("memory_timeline", kCalls, [&] { memory_timeline(program); });
  report("memory_peak", kCalls, [&] { memory_peak(program); });
  report("simulate", kCalls, [&] { simulate(program, costs); });
  report("simulate_summary", kCalls, [&] { simulate_summary(program, costs); });
}

// Of the plain plan's simulated peak.
constexpr int kBudgets[] = {130, 100, 80, 60, 50, 40, 30, 25, 22, 20};
constexpr int kPlans = 5;

void measure_auto(const char* title, const StepProgram& plain, const Estimator& costs) {
  StepProgram classical = plain;
  run_pipeline(classical, PassRegistry::with_builtins(), {"zero3_compile"});
  const Bytes peak = simulate_summary(classical, costs).peak;
  std::printf("auto, %s:\n", title);
  PassEnvironment environment;
  environment.estimator = &costs;
  environment.simulator = simulate_summary;
  for (const int percent : kBudgets) {
    environment.memory_budget = Bytes{peak.value / 100 * percent};
    std::optional<StepProgram> planned;
    std::string found;
    const auto plan = [&] {
      StepProgram program = plain;
      PassContext context(program, "auto", environment);
      try {
        AutoPlan().run(program, context);
        found = program.reasons.empty() ? "" : program.reasons.front().text;
        planned = std::move(program);
      } catch (const UserError& error) {
        found = error.what();
      }
    };
    environment.held = nullptr;
    report((std::to_string(percent) + "% of the plain peak").c_str(), kPlans, plan);
    std::printf("    %s\n", found.c_str());
    if (!planned) continue;
    const StepProgram held = *planned;
    environment.held = &held;
    report("  again, while it holds", kPlans, plan);
  }
}

int run(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: simulator_speed MACHINE.json [LAYERS]\n");
    return 2;
  }
  const int layers = argc > 2 ? std::max(1, std::atoi(argv[2])) : 80;
  const MachineCosts costs(load_machine(argv[1]));
  const StepProgram plain = parse_program(step_text(layers, kStates));
  StepProgram program = plain;
  run_pipeline(program, PassRegistry::with_builtins(), {"zero3_compile"});
  measure("ZeRO-3", program, costs);
  use_everything(program);
  measure("everything", program, costs);
  measure_auto("states fill the memory", plain, costs);
  measure_auto("activations fill it", parse_program(step_text(layers, kActivations)), costs);
  return 0;
}

}  // namespace
}  // namespace deepcompile

int main(int argc, char** argv) {
  return deepcompile::run(argc, argv);
}
