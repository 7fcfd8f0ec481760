// SPDX-License-Identifier: Apache-2.0
#include "passes/pipeline.h"

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "ir/verifier.h"
#include "passes/run_order.h"
#include "passes/section_edit.h"

namespace deepcompile {
namespace {

[[noreturn]] void fail(const Pass& pass, const std::string& message) {
  throw UserError("[passes] " + std::string(pass.name()) + ": " + message);
}

// Passes before `end` that provide `fact`; null if it is the program that has it.
const Pass* provider(const std::vector<const Pass*>& passes, size_t end, Fact fact) {
  for (size_t i = end; i-- > 0;) {
    const auto provided = passes[i]->contract().provides;
    if (std::find(provided.begin(), provided.end(), fact) != provided.end()) return passes[i];
  }
  return nullptr;
}

void check_contracts(const StepProgram& program, const std::vector<const Pass*>& passes) {
  std::set<Fact> facts = facts_of(program);
  for (size_t i = 0; i < passes.size(); ++i) {
    const Contract contract = passes[i]->contract();
    for (Fact fact : contract.needs) {
      if (facts.contains(fact)) continue;
      fail(*passes[i], "needs " + std::string(to_string(fact)) +
                           ", which neither the program nor an earlier pass provides. Put a pass "
                           "that does before it.");
    }
    for (Fact fact : contract.conflicts) {
      if (!facts.contains(fact)) continue;
      const Pass* by = provider(passes, i, fact);
      fail(*passes[i],
           "conflicts with " + std::string(to_string(fact)) + ", which " +
               (by ? std::string(by->name()) + " provides. Remove one of the two passes."
                   : "the program already has. Start from the unoptimised program."));
    }
    facts.insert(contract.provides.begin(), contract.provides.end());
  }
}

// `planned`: the program had transfers or updates, which it may not be without now.
void verify_after(const Pass& pass, const StepProgram& program, bool planned) {
  try {
    planned ? verify_plan(program) : verify(program);
  } catch (const UserError& error) {
    std::string_view cause = error.what();
    if (cause.starts_with("[ir] ")) cause.remove_prefix(5);
    fail(pass, "left a program that is not valid: " + std::string(cause));
  }
}

PassRecord run_one(StepProgram& program, const Pass& pass, const PipelineOptions& options) {
  PassRecord record;
  record.pass = pass.name();
  record.instrs_before = count_instrs(program);
  const SectionInstrs instrs = instrs_of(program);
  const size_t reasons = program.reasons.size();
  const bool planned = !compute_only(program);
  PassContext context(program, record.pass, options.environment);
  const std::optional<Nanos> start =
      options.clock ? std::optional<Nanos>(options.clock()) : std::nullopt;
  pass.run(program, context);
  if (start) record.time = options.clock() - *start;
  verify_after(pass, program, planned);
  const SectionInstrs now = instrs_of(program);
  if (const auto moved = moved_run(instrs, now, program)) fail(pass, *moved);
  record.changed = instrs != now;
  record.instrs_after = count_instrs(program);
  record.reasons = program.reasons.size() - std::min(program.reasons.size(), reasons);
  return record;
}

}  // namespace

std::vector<PassRecord> run_pipeline(StepProgram& program, const std::vector<const Pass*>& passes,
                                     const PipelineOptions& options) {
  verify(program);
  check_contracts(program, passes);
  StepProgram edited = program;
  std::vector<PassRecord> log;
  for (const Pass* pass : passes) {
    log.push_back(run_one(edited, *pass, options));
    log.back().number = static_cast<int>(log.size());
  }
  program = std::move(edited);
  return log;
}

std::vector<PassRecord> run_pipeline(StepProgram& program, const PassRegistry& registry,
                                     const std::vector<std::string>& names,
                                     const PipelineOptions& options) {
  std::vector<const Pass*> passes;
  for (const std::string& name : names) passes.push_back(&registry.get(name));
  return run_pipeline(program, passes, options);
}

std::string print(const std::vector<PassRecord>& log) {
  std::string out;
  for (const PassRecord& each : log) {
    out += std::to_string(each.number) + " " + each.pass + ": ";
    out += each.changed ? std::to_string(each.instrs_before) + " -> " +
                              std::to_string(each.instrs_after) + " instructions"
                        : std::string("no change");
    if (each.reasons > 0) {
      out += ", " + std::to_string(each.reasons) + (each.reasons == 1 ? " reason" : " reasons");
    }
    if (each.time) out += ", " + pretty(*each.time);
    out += '\n';
  }
  return out;
}

}  // namespace deepcompile
