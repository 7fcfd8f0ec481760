// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "ir/verifier.h"
#include "ir/verifier_error.h"

namespace deepcompile {
namespace {

// What a section knows about one parameter's full buffer.
enum class Buffer : uint8_t { kUnknown, kInFlight, kWhole, kReleased, kStale };

// One section at a time: no section leans on what another left whole.
class PlanVerifier {
 public:
  explicit PlanVerifier(const StepProgram& program)
      : program_(program),
        made_at_(program.values.size(), 0),
        deferred_(program.params.size()),
        applied_(program.params.size()),
        early_(program.params.size()) {
    for (const Section& section : program.sections) {
      for (const Instr& instr : section.instrs) {
        if (instr.op == Op::kDefer) deferred_[index(*instr.param)] = true;
      }
    }
  }

  void verify() {
    for (const Section& section : program_.sections) {
      begin(section);
      for (size_t at = 0; at < section.instrs.size(); ++at) step(section, at);
      end(section);
    }
  }

 private:
  struct State {
    Buffer buffer = Buffer::kUnknown;
    bool reduced = false;
    bool in_flight_reduction = false;
    bool accumulated = false;
    bool used = false;     // by a run
    bool updated = false;  // or deferred
  };

  void begin(const Section& section) {
    states_.assign(program_.params.size(), State{});
    for (size_t i = 0; i < states_.size(); ++i) {
      if (program_.params[i].placement == Placement::kSharded) continue;
      // What the step before deferred, a gather here applies: nothing may go round it.
      const bool late = deferred_[i] && section.kind != SectionKind::kUpdate;
      states_[i].buffer = late ? Buffer::kStale : Buffer::kWhole;
    }
    kind_ = section.kind;
    reduced_.assign(program_.values.size(), false);
    made_ = section.inputs;
    norm_ = false;
    any_update_ = false;
  }

  void step(const Section& section, size_t at) {
    const Instr& instr = section.instrs[at];
    const auto fail = [&](const std::string& message) {
      fail_instr(program_, section, at, message);
    };
    switch (instr.op) {
      case Op::kGather:
        return gather(*instr.param);
      case Op::kWait:
        return wait(*instr.param, fail);
      case Op::kRelease:
        return release(*instr.param, fail);
      case Op::kRun:
        return run(program_.region(*instr.region), fail);
      case Op::kReduce:
        return reduce(instr, fail);
      case Op::kAccumulate:
        return accumulate(*instr.param, fail);
      case Op::kNorm:
        return norm(fail);
      case Op::kUpdate:
        return update(*instr.param, fail);
      case Op::kDefer:
        return settle(*instr.param, fail);
      default:
        return;  // verify_residency's
    }
  }

  State& state(ParamId id) { return states_[index(id)]; }
  const std::string& name(ParamId id) const { return program_.param(id).name; }

  void gather(ParamId id) {
    applied_[index(id)] = true;
    Buffer& buffer = state(id).buffer;
    if (buffer != Buffer::kWhole) buffer = Buffer::kInFlight;
  }

  template <typename Fail>
  void wait(ParamId id, Fail fail) {
    Buffer& buffer = state(id).buffer;
    if (buffer != Buffer::kInFlight && buffer != Buffer::kWhole) {
      fail("nothing gathers " + name(id) + " before it. Put `gather " + name(id) + "` before it.");
    }
    buffer = Buffer::kWhole;
  }

  template <typename Fail>
  void release(ParamId id, Fail fail) {
    const Placement placement = program_.param(id).placement;
    if (placement != Placement::kSharded) {
      fail(name(id) + " is kept " + std::string(to_string(placement)) +
           " and has nothing to release. Remove it.");
    }
    Buffer& buffer = state(id).buffer;
    if (buffer == Buffer::kInFlight) {
      fail("the gather of " + name(id) + " may still be writing. Put `wait " + name(id) +
           "` before it.");
    }
    if (buffer == Buffer::kUnknown || buffer == Buffer::kReleased) {
      fail(name(id) + " is not whole here. Remove it, or gather " + name(id) + " first.");
    }
    buffer = Buffer::kReleased;
  }

  template <typename Fail>
  void run(const Region& region, Fail fail) {
    for (const Operand& operand : region.inputs) {
      const auto* ref = std::get_if<ParamRef>(&operand);
      if (ref == nullptr) continue;
      const std::string& p = name(ref->param);
      if (early_[index(ref->param)]) {
        fail("uses " + p + " after its update in this step's backward. Update it later.");
      }
      state(ref->param).used = true;
      switch (state(ref->param).buffer) {
        case Buffer::kWhole:
          break;
        case Buffer::kInFlight:
          fail("uses " + p + " before its gather has been waited for. Put `wait " + p +
               "` before it.");
          break;
        case Buffer::kReleased:
          fail("uses " + p + " after its release. Move the release after it, or gather " + p +
               " again.");
          break;
        case Buffer::kUnknown:
        case Buffer::kStale:
          fail("uses " + p + ", which nothing in this section gathers. Put `gather " + p +
               "` and `wait " + p + "` before it.");
      }
    }
    for (ValueId id : region.outputs) {
      made_.push_back(id);
      made_at_[index(id)] = made_.size();
    }
  }

  template <typename Fail>
  void reduce(const Instr& instr, Fail fail) {
    const ParamId id = *instr.param;
    if (!program_.param(id).trainable) fail(name(id) + " is frozen. Remove the reduce.");
    if (early_[index(id)]) {
      fail(name(id) + " has had its update in this step's backward. Update it later.");
    }
    if (state(id).reduced) {
      fail(name(id) + " is reduced already in this section. Reduce all its gradients at once.");
    }
    if (instr.values.empty()) fail("names no gradient. List the gradients of " + name(id) + ".");
    last_made_.assign(program_.param(id).members.size(), 0);
    for (ValueId value : instr.values) {
      const auto& of = program_.value(value).grad_of;
      if (!of || of->param != id) {
        fail(program_.value(value).name + " is not a gradient of " + name(id) + ". Remove it.");
      }
      if (reduced_[index(value)]) {
        fail("names " + program_.value(value).name + " twice. Remove one of them.");
      }
      reduced_[index(value)] = true;
      size_t& last = last_made_[of->member];
      if (made_at_[index(value)] < last) {
        fail("names " + program_.value(value).name +
             " behind a gradient of the same member that is made later: they are added in this "
             "order. Name them as they are made.");
      }
      last = made_at_[index(value)];
    }
    state(id).reduced = true;
    state(id).in_flight_reduction = true;
  }

  template <typename Fail>
  void accumulate(ParamId id, Fail fail) {
    if (!state(id).in_flight_reduction) {
      fail("no reduction of " + name(id) + " is under way. Put it after `reduce " + name(id) +
           "`, once.");
    }
    if (deferred_[index(id)] && !applied_[index(id)]) {
      fail("the last step's update of " + name(id) +
           " is deferred, and nothing before this applies it: two steps' gradients would be "
           "added. Put `update " +
           name(id) + "` into the forward, or do not defer it.");
    }
    state(id).in_flight_reduction = false;
    state(id).accumulated = true;
  }

  template <typename Fail>
  void norm(Fail fail) {
    if (!program_.clip) fail("the step does not clip. Remove it, or add `clip` to the step.");
    if (norm_) fail("the norm is there twice. Remove one of them.");
    if (any_update_) fail("stands after an update. Put it before all updates.");
    norm_ = true;
  }

  // Each trainable parameter has one `update` or `defer` in the update section.
  template <typename Fail>
  void settle(ParamId id, Fail fail) {
    State& s = state(id);
    if (!program_.param(id).trainable) fail(name(id) + " is frozen. Remove the update.");
    if (s.updated) fail(name(id) + " is updated already. Remove one of the updates.");
    if (program_.clip && !norm_ && kind_ == SectionKind::kUpdate) {
      fail("the step clips and has no norm before this. Put `norm` before all updates.");
    }
    s.updated = true;
    any_update_ = true;
  }

  template <typename Fail>
  void update(ParamId id, Fail fail) {
    settle(id, fail);
    applied_[index(id)] = true;
    State& s = state(id);
    if (kind_ == SectionKind::kForward && s.used) {
      fail("stands after a use of " + name(id) + ". Put it before.");
    }
    if (kind_ == SectionKind::kBackward) {
      if (program_.clip) fail("the step clips, and the norm comes after. Leave it to the update.");
      if (!s.accumulated) {
        fail("the gradient of " + name(id) + " is not complete. Put `accumulate " + name(id) +
             "` before it.");
      }
      early_[index(id)] = true;
    }
    if (s.buffer == Buffer::kInFlight) {
      fail("the gather of " + name(id) + " may still be reading the shard. Put `wait " + name(id) +
           "` before it.");
    }
    if (program_.param(id).placement == Placement::kReplicated) {
      s.buffer = Buffer::kWhole;
      return;
    }
    if (s.buffer == Buffer::kWhole) s.buffer = Buffer::kStale;
  }

  void end(const Section& section) {
    const auto fail = [&](const std::string& message) { fail_section(program_, section, message); };
    for (ValueId value : made_) {
      const auto& of = program_.value(value).grad_of;
      if (!of || reduced_[index(value)]) continue;
      fail("the gradient " + program_.value(value).name + " is never reduced. Name it in `reduce " +
           name(of->param) + "`.");
    }
    for (size_t i = 0; i < states_.size(); ++i) {
      const Param& param = program_.params[i];
      if (states_[i].in_flight_reduction) {
        fail("the reduction of " + param.name + " is never accumulated. Put `accumulate " +
             param.name + "` before the end.");
      }
      if (section.kind != SectionKind::kUpdate) continue;
      if (param.trainable && !states_[i].updated) {
        fail(param.name + " is never updated. Put `update " + param.name + "` into it, or mark " +
             param.name + " frozen.");
      }
      const bool kept = param.placement == Placement::kWhole && !deferred_[i];
      if (kept && states_[i].buffer != Buffer::kWhole) {
        fail(param.name +
             " is kept whole and is not gathered again after its update. Put `gather " +
             param.name + "` and `wait " + param.name + "` after it.");
      }
    }
  }

  const StepProgram& program_;
  std::vector<State> states_;
  std::vector<bool> reduced_;      // by value
  std::vector<ValueId> made_;      // in this section
  std::vector<size_t> made_at_;    // by value: its place there
  std::vector<size_t> last_made_;  // by member of one parameter: where its last gradient is made
  SectionKind kind_ = SectionKind::kForward;
  std::vector<bool> deferred_;  // by parameter: by the update section
  std::vector<bool> applied_;   // by parameter: a deferred update is over by now
  std::vector<bool> early_;     // by parameter: updated in a backward so far
  bool norm_ = false;
  bool any_update_ = false;
};

}  // namespace

void verify_plan(const StepProgram& program) {
  verify_structure(program);
  PlanVerifier(program).verify();
  verify_residency(program);
}

bool compute_only(const StepProgram& program) {
  return std::all_of(program.sections.begin(), program.sections.end(), [](const Section& section) {
    return std::all_of(section.instrs.begin(), section.instrs.end(),
                       [](const Instr& instr) { return instr.op == Op::kRun; });
  });
}

void verify(const StepProgram& program) {
  compute_only(program) ? verify_structure(program) : verify_plan(program);
}

}  // namespace deepcompile
