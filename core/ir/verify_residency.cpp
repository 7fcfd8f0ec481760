// SPDX-License-Identifier: Apache-2.0
// Where saved activations and optimizer states are: on the device, on the
// host, or on their way.
#include <unordered_map>

#include "ir/verifier.h"
#include "ir/verifier_error.h"

namespace deepcompile {
namespace {

// kUnknown: of states at a section's start, as no section leans on another.
enum class Home : uint8_t { kUnknown, kDevice, kLeaving, kHost, kComing };

class ResidencyVerifier {
 public:
  explicit ResidencyVerifier(const StepProgram& program)
      : program_(program),
        values_(program.values.size(), Home::kDevice),
        callers_(program.values.size(), false) {
    for (const Section& section : program.sections) {
      for (const auto* ids : {&section.inputs, &section.outputs}) {
        for (ValueId id : *ids) callers_[index(id)] = true;
      }
    }
  }

  void verify() {
    for (const Section& section : program_.sections) {
      section_ = &section;
      states_.assign(program_.params.size(), Home::kUnknown);
      for (at_ = 0; at_ < section.instrs.size(); ++at_) step(section.instrs[at_]);
      for (ValueId id : section.outputs) here(id, "is an output of this section");
      end();
    }
  }

 private:
  [[noreturn]] void fail(const std::string& message) const {
    if (at_ < section_->instrs.size()) fail_instr(program_, *section_, at_, message);
    fail_section(program_, *section_, message);
  }
  const std::string& name(ValueId id) const { return program_.value(id).name; }
  const std::string& name(ParamId id) const { return program_.param(id).name; }

  void step(const Instr& instr) {
    switch (instr.op) {
      case Op::kRun:
        return run(program_.region(*instr.region));
      case Op::kReduce:
        for (ValueId id : instr.values) here(id, "is reduced");
        return;
      case Op::kUpdate:
        return update(*instr.param);
      case Op::kOffload:
      case Op::kEvict:
      case Op::kReload:
      case Op::kAwait:
        if (instr.values.empty()) fail("names no value. List what moves.");
        for (ValueId id : instr.values) {
          if (instr.op == Op::kOffload) own(id);
          if (traits(instr.op).resource != Resource::kNone) moved_[section_->graph].push_back(id);
          move(&values_[index(id)], instr.op, name(id), "");
        }
        return;
      case Op::kOffloadStates:
      case Op::kEvictStates:
      case Op::kReloadStates:
      case Op::kAwaitStates:
        if (!program_.param(*instr.param).trainable) {
          fail(name(*instr.param) + " is frozen and has no optimizer states. Remove it.");
        }
        move(&states_[index(*instr.param)], value_op(instr.op), name(*instr.param), "_states");
        return;
      default:
        return;
    }
  }

  static Op value_op(Op op) {
    const int distance = static_cast<int>(Op::kOffload) - static_cast<int>(Op::kOffloadStates);
    return static_cast<Op>(static_cast<int>(op) + distance);
  }

  void move(Home* home, Op op, const std::string& what, const std::string& kind) {
    const auto from = [&](Home wanted, const std::string& before) {
      if (*home == wanted || *home == Home::kUnknown) return;
      fail(what + " is not " + before + ". Remove it, or put it elsewhere.");
    };
    if (op == Op::kOffload) {
      from(Home::kDevice, "on the device, at rest");
      *home = Home::kLeaving;
    } else if (op == Op::kEvict) {
      from(Home::kLeaving, "being copied out: put `offload" + kind + " " + what + "` before it");
      *home = Home::kHost;
    } else if (op == Op::kReload) {
      from(Home::kHost, "on the host");
      *home = Home::kComing;
    } else {
      from(Home::kComing, "being copied in: put `reload" + kind + " " + what + "` before it");
      *home = Home::kDevice;
    }
  }

  // What the caller holds too keeps its memory whatever a plan does.
  void own(ValueId id) const {
    if (!callers_[index(id)]) return;
    fail(name(id) + " is the caller's too, so its memory would not be given back. Remove it.");
  }

  void here(ValueId id, const char* why) const {
    const Home home = values_[index(id)];
    if (home == Home::kDevice || home == Home::kLeaving) return;
    fail(name(id) + " " + why + " and is not on the device. Put `await (" + name(id) +
         ")` before it.");
  }

  void run(const Region& region) {
    for (const Operand& operand : region.inputs) {
      if (const auto* id = std::get_if<ValueId>(&operand)) here(*id, "is read");
    }
    for (ValueId id : region.outputs) {
      if (values_[index(id)] != Home::kDevice) {
        fail("makes " + name(id) + " again, which is on the host or on its way. Do one of both.");
      }
    }
  }

  void update(ParamId id) {
    const Home home = states_[index(id)];
    if (home == Home::kUnknown || home == Home::kDevice) return;
    const char* wanted = home == Home::kLeaving ? "evict_states and bring back"
                         : home == Home::kHost  ? "reload_states and await_states"
                                                : "await_states";
    fail("the optimizer states of " + name(id) + " are not on the device. Put `" + wanted + " " +
         name(id) + "` before it.");
  }

  // Nothing of a graph may be on its way when its last section is over.
  void end() {
    const bool more = section_->kind == SectionKind::kForward &&
                      program_.find_section(SectionKind::kBackward, section_->graph);
    if (more || section_->kind == SectionKind::kUpdate) return;
    for (ValueId id : moved_[section_->graph]) {
      const Home home = values_[index(id)];
      if (home != Home::kLeaving && home != Home::kComing) continue;
      fail("the copy of " + name(id) + " is never waited for. Put `" +
           (home == Home::kLeaving ? "evict (" : "await (") + name(id) + ")` before the end.");
    }
    moved_.erase(section_->graph);
  }

  const StepProgram& program_;
  const Section* section_ = nullptr;
  size_t at_ = 0;
  std::vector<Home> values_;   // over the step: a graph's values are its sections' own
  std::vector<Home> states_;   // in this section
  std::vector<bool> callers_;  // by value: an input or output of a section
  std::unordered_map<uint32_t, std::vector<ValueId>> moved_;  // by graph: copied either way
};

}  // namespace

void verify_residency(const StepProgram& program) {
  ResidencyVerifier(program).verify();
}

}  // namespace deepcompile
