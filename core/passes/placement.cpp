// SPDX-License-Identifier: Apache-2.0
#include "passes/placement.h"

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "ir/text.h"

namespace deepcompile {
namespace {

// Calls visit(parameter, value) for each gradient that the run makes.
template <typename Visit>
void for_each_gradient(const StepProgram& program, const Instr& run, Visit visit) {
  for (ValueId id : program.region(*run.region).outputs) {
    if (const auto& of = program.value(id).grad_of) visit(of->param, id);
  }
}

}  // namespace

ReductionPlacer::ReductionPlacer(const StepProgram& program, const std::vector<Instr>& runs)
    : program_(program), gradients_(program.params.size()), missing_(program.params.size(), 0) {
  for (const Instr& run : runs) {
    for_each_gradient(program, run, [&](ParamId param, ValueId) { ++missing_[index(param)]; });
  }
}

void ReductionPlacer::after_run(const Instr& run, std::vector<Instr>* out) {
  std::vector<ParamId> complete;
  for_each_gradient(program_, run, [&](ParamId param, ValueId value) {
    gradients_[index(param)].push_back(value);
    if (--missing_[index(param)] == 0) complete.push_back(param);
  });
  std::sort(complete.begin(), complete.end());
  for (ParamId param : complete) {
    if (in_flight_.size() == kReductionsInFlight) accumulate_oldest(out);
    out->push_back({Op::kReduce, param, std::nullopt, std::move(gradients_[index(param)])});
    in_flight_.push_back(param);
    ++count_;
  }
}

void ReductionPlacer::at_end(std::vector<Instr>* out) {
  while (!in_flight_.empty()) accumulate_oldest(out);
}

void ReductionPlacer::accumulate_oldest(std::vector<Instr>* out) {
  out->push_back({Op::kAccumulate, in_flight_.front(), std::nullopt, {}});
  in_flight_.erase(in_flight_.begin());
}

void check_compute_only(const StepProgram& program, std::string_view pass) {
  for (const Section& section : program.sections) {
    for (const Instr& instr : section.instrs) {
      if (instr.op == Op::kRun) continue;
      throw UserError("[passes] " + std::string(pass) + ": " + section_name(section) +
                      " already holds `" + print(program, instr) +
                      "`, and this pass places everything but runs itself. Start from the "
                      "unoptimised program.");
    }
  }
}

size_t place_reductions(const StepProgram& program, Section* backward) {
  ReductionPlacer reductions(program, backward->instrs);
  std::vector<Instr> out;
  for (Instr& run : backward->instrs) {
    out.push_back(run);
    reductions.after_run(run, &out);
  }
  reductions.at_end(&out);
  backward->instrs = std::move(out);
  return reductions.count();
}

std::vector<Instr> place_updates(const StepProgram& program) {
  std::vector<Instr> out;
  if (program.clip) out.push_back({Op::kNorm, std::nullopt, std::nullopt, {}});
  for (size_t i = 0; i < program.params.size(); ++i) {
    if (!program.params[i].trainable) continue;
    out.push_back({Op::kUpdate, ParamId{static_cast<uint32_t>(i)}, std::nullopt, {}});
  }
  return out;
}

}  // namespace deepcompile
