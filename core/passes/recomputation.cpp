// SPDX-License-Identifier: Apache-2.0
#include "passes/recomputation.h"

#include <algorithm>
#include <utility>

#include "base/lists.h"
#include "passes/region_blocks.h"
#include "passes/run_order.h"
#include "passes/section_edit.h"

namespace deepcompile {
namespace {

// Calls visit(value) for each value that the instruction reads.
template <typename Visit>
void for_each_read(const StepProgram& program, const Instr& instr, Visit visit) {
  for (ValueId id : instr.values) visit(id);
  if (!instr.region) return;
  for (const Operand& operand : program.region(*instr.region).inputs) {
    if (const auto* id = std::get_if<ValueId>(&operand)) visit(*id);
  }
}

RecomputableGraph read_graph(const StepProgram& program, size_t forward, size_t backward) {
  RecomputableGraph out;
  out.forward = forward;
  out.backward = backward;
  out.values.resize(program.values.size());
  const Section& first = program.sections[forward];
  for (ValueId id : first.outputs) out.values[index(id)].output = true;
  for (size_t i = 0; i < first.instrs.size(); ++i) {
    if (first.instrs[i].op != Op::kRun) continue;
    const size_t run = out.runs.size();
    const RegionId region = *first.instrs[i].region;
    out.runs.push_back(region);
    out.instrs.push_back(i);
    for (ValueId id : program.region(region).outputs) out.values[index(id)].maker = run;
    for_each_read(program, first.instrs[i], [&](ValueId id) {
      std::vector<size_t>& users = out.values[index(id)].users;
      if (users.empty() || users.back() != run) users.push_back(run);
    });
  }
  const Section& second = program.sections[backward];
  for (size_t i = 0; i < second.instrs.size(); ++i) {
    for_each_read(program, second.instrs[i], [&](ValueId id) {
      ValueUse& use = out.values[index(id)];
      if (use.first_backward == kNever) use.first_backward = i;
      use.last_backward = i;
    });
  }
  for (ValueId id : second.outputs) out.values[index(id)].output = true;
  return out;
}

// What the backward runs again already stays as it is, and so does what may
// not run twice. What reads an input that a `once` region of either section may
// write to would not read the same again.
void find_allowed(const StepProgram& program, RecomputableGraph* graph) {
  const auto writers = input_writers(program);
  std::vector<bool> ran(program.regions.size(), false);
  for (const Instr& instr : program.sections[graph->backward].instrs) {
    if (instr.region) ran[index(*instr.region)] = true;
  }
  for (RegionId id : graph->runs) {
    const Region& region = program.region(id);
    const bool safe =
        std::none_of(region.inputs.begin(), region.inputs.end(), [&](const Operand& operand) {
          const auto* value = std::get_if<ValueId>(&operand);
          return value != nullptr && !writers[index(*value)].empty();
        });
    graph->allowed.push_back(safe && !region.once && !ran[index(id)]);
  }
}

// Rebuilds one backward.
class RecomputationPlacer {
 public:
  RecomputationPlacer(const StepProgram& program, const RecomputableGraph& graph,
                      const Recomputation& plan, bool share)
      : program_(program),
        graph_(graph),
        plan_(plan),
        share_(share),
        instrs_(program.sections[graph.backward].instrs),
        edit_(instrs_),
        whole_(program.params.size(), Buffer::kAway),
        gathers_(program.params.size()),
        late_(program.params.size(), false) {
    for (const Section& section : program.sections) {
      for (const Instr& instr : section.instrs) {
        if (instr.op == Op::kGather && section.kind != SectionKind::kUpdate) gathered_ = true;
        if (instr.op == Op::kDefer) late_[index(*instr.param)] = true;
      }
    }
    for (size_t i = 0; i < instrs_.size(); ++i) {
      if (instrs_[i].op == Op::kGather) gathers_[index(*instrs_[i].param)].push_back(i);
    }
  }

  std::vector<Instr> build() && {
    std::vector<std::vector<size_t>> chains(instrs_.size());
    for (size_t run = 0; run < plan_.again.size(); ++run) {
      if (plan_.again[run]) chains[plan_.place[run]].push_back(run);
    }
    for (size_t i = 0; i < instrs_.size(); ++i) {
      if (!chains[i].empty()) place(i, chains[i]);
      if (!edit_.dropped(i)) track(instrs_[i]);
    }
    return std::move(edit_).apply();
  }

 private:
  enum class Buffer : uint8_t { kAway, kComing, kWhole };

  void track(const Instr& instr) {
    if (!instr.param) return;
    Buffer& buffer = whole_[index(*instr.param)];
    if (instr.op == Op::kGather && buffer == Buffer::kAway) buffer = Buffer::kComing;
    if (instr.op == Op::kWait) buffer = Buffer::kWhole;
    if (instr.op == Op::kRelease) buffer = Buffer::kAway;
  }

  std::vector<ParamId> to_gather(size_t run) const {
    std::vector<ParamId> out;
    for (const Operand& operand : program_.region(graph_.runs[run]).inputs) {
      const auto* ref = std::get_if<ParamRef>(&operand);
      if (ref == nullptr) continue;
      const bool sharded = program_.param(ref->param).placement == Placement::kSharded;
      if (sharded ? !gathered_ : !late_[index(ref->param)]) continue;
      if (std::find(out.begin(), out.end(), ref->param) == out.end()) out.push_back(ref->param);
    }
    return out;
  }

  void place(size_t at, const std::vector<size_t>& chain) {
    std::vector<ParamId> mine;  // gathered for the chain alone
    for (size_t run : chain) {
      const std::vector<ParamId> params = to_gather(run);
      for (ParamId param : params) {
        if (whole_[index(param)] != Buffer::kAway) continue;
        insert(at, Op::kGather, param);
        if (!take_gather(param, at, plan_.until[graph_.block[run]])) mine.push_back(param);
      }
      for (ParamId param : params) {
        if (whole_[index(param)] == Buffer::kComing) insert(at, Op::kWait, param);
      }
      edit_.insert(at, {Op::kRun, std::nullopt, graph_.runs[run], {}});
      for (ParamId param : mine) {
        const bool sharded = program_.param(param).placement == Placement::kSharded;
        if (sharded && last_reader(chain, param) == run) insert(at, Op::kRelease, param);
      }
    }
  }

  size_t last_reader(const std::vector<size_t>& chain, ParamId param) const {
    size_t last = kNever;
    for (size_t run : chain) {
      const auto params = to_gather(run);
      if (std::find(params.begin(), params.end(), param) != params.end()) last = run;
    }
    return last;
  }

  void insert(size_t at, Op op, ParamId param) {
    edit_.insert(at, on_param(op, param));
    track(on_param(op, param));
  }

  // Leaves the release to the backward, and takes its gather out, if it
  // gathers the parameter no later than `until`.
  bool take_gather(ParamId param, size_t at, size_t until) {
    const auto& own = gathers_[index(param)];
    const auto next = std::lower_bound(own.begin(), own.end(), at);
    if (!share_ || next == own.end() || *next > until) return false;
    edit_.drop(*next);
    for (size_t i = *next; i < instrs_.size(); ++i) {
      if (instrs_[i].op != Op::kWait || instrs_[i].param != param) continue;
      edit_.drop(i);
      break;
    }
    return true;
  }

  const StepProgram& program_;
  const RecomputableGraph& graph_;
  const Recomputation& plan_;
  bool share_;
  const std::vector<Instr>& instrs_;
  SectionEdit edit_;
  std::vector<Buffer> whole_;                 // by parameter, where the walk is
  std::vector<std::vector<size_t>> gathers_;  // by parameter: the backward's own
  std::vector<bool> late_;                    // by parameter: its update is deferred
  bool gathered_ = false;                     // the program gathers what it uses
};

}  // namespace

std::vector<RecomputableGraph> recomputable_graphs(const StepProgram& program) {
  std::vector<RecomputableGraph> out;
  for (size_t s = 0; s < program.sections.size(); ++s) {
    if (program.sections[s].kind != SectionKind::kForward) continue;
    const auto backward = program.find_section(SectionKind::kBackward, program.sections[s].graph);
    if (!backward) continue;
    RecomputableGraph graph = read_graph(program, s, index(*backward));
    find_allowed(program, &graph);
    graph.block = divide_into_blocks(program, graph.runs);
    for (size_t run = 0; run < graph.runs.size(); ++run) {
      if (run == 0 || graph.block[run] != graph.block[run - 1]) graph.first_run.push_back(run);
    }
    graph.first_run.push_back(graph.runs.size());
    out.push_back(std::move(graph));
  }
  return out;
}

bool is_pinned(const RecomputableGraph& graph, const std::vector<bool>& again, ValueId id) {
  const ValueUse& value = graph.values[index(id)];
  if (value.output || value.maker == kNever) return true;
  return std::any_of(value.users.begin(), value.users.end(), [&](size_t user) {
    return again[user] && graph.block[user] != graph.block[value.maker];
  });
}

namespace {

// To the last instruction that reads what the run makes, or what it and others
// of its block alone were given.
void extend_until(const StepProgram& program, const RecomputableGraph& graph, size_t run,
                  size_t* until) {
  const auto extend = [&](ValueId id) {
    const ValueUse& value = graph.values[index(id)];
    if (value.maker == kNever || value.last_backward == kNever) return;
    *until = std::max(*until, value.last_backward);
  };
  const Region& region = program.region(graph.runs[run]);
  for (ValueId id : region.outputs) {
    if (!graph.values[index(id)].output) extend(id);
  }
  for (const Operand& operand : region.inputs) {
    const auto* id = std::get_if<ValueId>(&operand);
    if (id == nullptr) continue;
    const std::vector<size_t>& users = graph.values[index(*id)].users;
    const bool alone = std::all_of(users.begin(), users.end(), [&](size_t user) {
      return graph.block[user] == graph.block[run];
    });
    if (alone) extend(*id);
  }
}

}  // namespace

void plan_block(const StepProgram& program, const RecomputableGraph& graph, size_t block,
                const std::vector<bool>& chosen, Recomputation* plan) {
  plan->until[block] = 0;
  // From the last run, as those that read a value come after its maker.
  for (size_t run = graph.first_run[block + 1]; run-- > graph.first_run[block];) {
    plan->again[run] = false;
    plan->place[run] = kNever;
    if (!chosen[run]) continue;
    for (ValueId id : program.region(graph.runs[run]).outputs) {
      if (is_pinned(graph, plan->again, id)) continue;
      const ValueUse& value = graph.values[index(id)];
      size_t first = value.first_backward;
      for (size_t user : value.users) {
        if (plan->again[user]) first = std::min(first, plan->place[user]);
      }
      if (first == kNever) continue;
      plan->again[run] = true;
      plan->place[run] = std::min(plan->place[run], first);
    }
    if (plan->again[run]) extend_until(program, graph, run, &plan->until[block]);
  }
}

Recomputation plan_recomputation(const StepProgram& program, const RecomputableGraph& graph,
                                 const std::vector<bool>& chosen) {
  Recomputation out;
  out.again.assign(graph.runs.size(), false);
  out.place.assign(graph.runs.size(), kNever);
  out.until.assign(graph.blocks(), 0);
  for (size_t block = graph.blocks(); block-- > 0;) {
    plan_block(program, graph, block, chosen, &out);
  }
  return out;
}

std::vector<Recomputation> plan_recomputations(const StepProgram& program,
                                               const std::vector<RecomputableGraph>& graphs,
                                               const std::vector<RegionId>& regions) {
  const std::vector<bool> named = marked(regions, program.regions.size());
  std::vector<Recomputation> plans;
  for (const RecomputableGraph& graph : graphs) {
    std::vector<bool> chosen;
    for (size_t run = 0; run < graph.runs.size(); ++run) {
      chosen.push_back(named[index(graph.runs[run])] && graph.allowed[run]);
    }
    plans.push_back(plan_recomputation(program, graph, chosen));
  }
  return plans;
}

void place_recomputation(const RecomputableGraph& graph, const Recomputation& plan, bool share,
                         StepProgram* program) {
  program->sections[graph.backward].instrs =
      RecomputationPlacer(*program, graph, plan, share).build();
}

}  // namespace deepcompile
