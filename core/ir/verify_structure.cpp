// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "ir/verifier.h"
#include "ir/verifier_error.h"

namespace deepcompile {
namespace {

class StructureVerifier {
 public:
  explicit StructureVerifier(const StepProgram& program)
      : program_(program),
        made_(program.values.size()),
        written_(program.values.size()),
        ran_(program.regions.size()) {}

  void verify() {
    tables();
    layout();
    for (size_t i = 0; i < program_.sections.size(); ++i) flow(i);
    for (size_t i = 0; i < ran_.size(); ++i) {
      if (ran_[i].section >= 0) continue;
      fail("region " + program_.regions[i].name +
           " is never run. Run it or remove it; if the text was cut short, save it again.");
    }
  }

 private:
  // Who made a value: a region, or a section's caller.
  struct Made {
    int64_t section = -1;  // -1: nobody so far
    std::optional<RegionId> region;
  };
  struct Ran {
    int64_t section = -1;  // the last that ran it
    uint32_t graph = 0;
    size_t place = 0;  // of its first run, among all runs
  };
  // By whom an input of its graph may have been written to last.
  struct Written {
    size_t place = 0;
    std::optional<RegionId> by;
  };

  [[noreturn]] void fail(const std::string& message) const { fail_program(program_, message); }

  void tables() const {
    if (program_.world < 1 || program_.accumulation < 1) {
      fail("world is " + std::to_string(program_.world) + " and accumulation " +
           std::to_string(program_.accumulation) + ". Both are at least 1.");
    }
    if (program_.accumulation > kMostAccumulation) {
      fail("accumulation is " + std::to_string(program_.accumulation) + ". Give at most " +
           std::to_string(kMostAccumulation) + ".");
    }
    for (size_t i = 0; i < program_.params.size(); ++i) {
      const Param& each = program_.params[i];
      const auto found = program_.find_param(each.name);
      if (!found || index(*found) != i) fail_unregistered("parameter", each.name);
      if (each.numel < 1 || each.members.empty()) {
        fail("parameter " + each.name + " has no " + (each.numel < 1 ? "elements" : "members") +
             ". Give it at least one.");
      }
    }
    for (size_t i = 0; i < program_.values.size(); ++i) value_entry(i);
    for (size_t i = 0; i < program_.regions.size(); ++i) region_entry(i);
    sums();
  }

  // Of sizes and times, so that whoever adds them up gets numbers.
  void sums() const {
    int64_t elements = 0, bytes = 0;
    Nanos time;
    for (const Param& each : program_.params) add("elements of parameters", each.numel, &elements);
    for (const Value& each : program_.values) add("bytes of values", each.bytes.value, &bytes);
    for (const Region& each : program_.regions) {
      add("bytes of values and workspaces", each.workspace.value, &bytes);
      if (!each.time) continue;
      time += std::min(*each.time, kLongestStep);
      if (time.value <= kLongestStep.value / program_.accumulation) continue;
      fail("its regions take more than nine years a step. Correct their times.");
    }
  }

  void add(const char* what, int64_t number, int64_t* sum) const {
    *sum += std::min(number, kMostInAll);
    if (*sum <= kMostInAll) return;
    fail("has more " + std::string(what) + " than the " + std::to_string(kMostInAll) +
         " there can be. Correct their sizes.");
  }

  [[noreturn]] void fail_unregistered(const char* what, const std::string& name) const {
    fail(std::string(what) + " '" + name + "' is not in the table of names. Add it through add_" +
         (what[0] == 'p' ? "param" : what) + ", and do not rename it.");
  }

  void value_entry(size_t i) const {
    const Value& each = program_.values[i];
    const auto found = program_.find_value(each.name);
    if (!found || index(*found) != i) fail_unregistered("value", each.name);
    if (each.bytes.value < 0) fail("value " + each.name + " has a negative size. Correct it.");
    if (!each.grad_of) return;
    param_ref("value " + each.name, *each.grad_of);
    const Param& owner = program_.param(each.grad_of->param);
    if (owner.trainable) return;
    fail("value " + each.name + " is the gradient of " + owner.name +
         ", which is frozen. Leave out `grad=`, or the `frozen`.");
  }

  void region_entry(size_t i) const {
    const Region& each = program_.regions[i];
    const auto found = program_.find_region(each.name);
    if (!found || index(*found) != i) fail_unregistered("region", each.name);
    for (const Operand& operand : each.inputs) {
      if (const auto* ref = std::get_if<ParamRef>(&operand)) {
        param_ref("region " + each.name, *ref);
      } else {
        value_id("region " + each.name, std::get<ValueId>(operand));
      }
    }
    for (ValueId id : each.outputs) value_id("region " + each.name, id);
  }

  void param_ref(const std::string& holder, ParamRef ref) const {
    if (index(ref.param) < program_.params.size() &&
        ref.member < program_.param(ref.param).members.size()) {
      return;
    }
    fail(holder + " names member " + std::to_string(ref.member) + " of parameter " +
         std::to_string(index(ref.param)) + ", which is not there. Correct the reference.");
  }

  void value_id(const std::string& holder, ValueId id) const {
    if (index(id) < program_.values.size()) return;
    fail(holder + " names value " + std::to_string(index(id)) +
         ", which is not there. Correct the reference.");
  }

  // Which sections there are, and in which order.
  void layout() const {
    if (program_.sections.empty()) {
      fail(
          "has no sections. Add a forward, backward, inference or update; if the text was cut "
          "short, save it again.");
    }
    for (size_t i = 0; i < program_.sections.size(); ++i) {
      const Section& section = program_.sections[i];
      if (section.kind == SectionKind::kUpdate) {
        update_layout(i);
        continue;
      }
      const auto first = program_.find_section(section.kind, section.graph);
      if (index(*first) != i) {
        fail_section(program_, section, "is there twice. Give each graph its own number.");
      }
      const auto forward = program_.find_section(SectionKind::kForward, section.graph);
      if (section.kind == SectionKind::kBackward && !(forward && index(*forward) < i)) {
        fail_section(program_, section,
                     "no forward " + std::to_string(section.graph) +
                         " stands before it. Put the graph's forward first.");
      }
      if (section.kind == SectionKind::kInference && forward) {
        fail_section(program_, section,
                     "the graph also has a forward. Give the inference graph its own number.");
      }
    }
  }

  void update_layout(size_t at) const {
    const Section& section = program_.sections[at];
    if (at + 1 != program_.sections.size()) {
      fail_section(program_, section, "is not the last section. Put it at the end, once.");
    }
    if (section.graph != 0 || !section.inputs.empty() || !section.outputs.empty()) {
      fail_section(program_, section,
                   "has a graph number, inputs or outputs. It takes none: gradients come from "
                   "their shards.");
    }
  }

  // Values made before use, and instructions that are whole and in their place.
  void flow(size_t section_at) {
    const Section& section = program_.sections[section_at];
    for (ValueId id : section.inputs) {
      value_id(section_name(section), id);
      if (made_[index(id)].section >= 0) {
        fail_section(program_, section,
                     "input " + program_.value(id).name + " is made already, " + maker(id) +
                         ". One value has one maker: rename one.");
      }
      made_[index(id)] = {static_cast<int64_t>(section_at), std::nullopt};
    }
    for (size_t at = 0; at < section.instrs.size(); ++at) {
      operands(section, at);
      const Instr& instr = section.instrs[at];
      for (ValueId id : instr.values) use(section, at, id);
      if (instr.op == Op::kRun) run(section_at, at, *instr.region);
    }
    for (ValueId id : section.outputs) {
      value_id(section_name(section), id);
      if (available(section, id)) continue;
      fail_section(program_, section,
                   "output " + program_.value(id).name +
                       " is not made by its end. Run the region that makes it.");
    }
  }

  void operands(const Section& section, size_t at) const {
    const Instr& instr = section.instrs[at];
    if (static_cast<int>(instr.op) >= kOpCount) {
      fail_section(program_, section, "instruction " + std::to_string(at + 1) + " is unknown.");
    }
    const OpTraits& of = traits(instr.op);
    const bool param_ok =
        of.takes_param ? instr.param && index(*instr.param) < program_.params.size() : !instr.param;
    const bool region_ok = of.takes_region
                               ? instr.region && index(*instr.region) < program_.regions.size()
                               : !instr.region;
    const bool values_ok = (of.takes_values || instr.values.empty()) &&
                           std::all_of(instr.values.begin(), instr.values.end(), [&](ValueId id) {
                             return index(id) < program_.values.size();
                           });
    if (!param_ok || !region_ok || !values_ok) {
      fail_section(program_, section,
                   "instruction " + std::to_string(at + 1) + " (" + std::string(of.name) +
                       ") has a missing, surplus or unknown operand. Give it what its kind takes.");
    }
    if (!belongs(instr.op, section.kind)) {
      fail_instr(program_, section, at,
                 "does not belong in " + article(section.kind) + " section. Move it to " +
                     home(instr.op) + ".");
    }
  }

  static bool belongs(Op op, SectionKind kind) {
    switch (op) {
      case Op::kGather:
      case Op::kWait:
      case Op::kRelease:
      case Op::kOffloadStates:
      case Op::kEvictStates:
      case Op::kReloadStates:
      case Op::kAwaitStates:
        return true;
      case Op::kRun:
        return kind != SectionKind::kUpdate;
      case Op::kReduce:
      case Op::kAccumulate:
        return kind == SectionKind::kBackward;
      case Op::kUpdate:
        return kind != SectionKind::kInference;
      case Op::kNorm:
      case Op::kDefer:
        return kind == SectionKind::kUpdate;
      case Op::kOffload:
      case Op::kEvict:
      case Op::kReload:
      case Op::kAwait:
        return kind == SectionKind::kForward || kind == SectionKind::kBackward;
    }
    return false;
  }
  static std::string home(Op op) {
    if (op == Op::kRun) return "a forward, backward or inference";
    if (op == Op::kUpdate) return "a forward, a backward or the update";
    if (traits(op).takes_values && op != Op::kReduce) return "a forward or backward";
    return op == Op::kReduce || op == Op::kAccumulate ? "a backward" : "the update";
  }
  static std::string article(SectionKind kind) {
    const std::string word(to_string(kind));
    return (word[0] == 'i' || word[0] == 'u' ? "an " : "a ") + word;
  }

  void run(size_t section_at, size_t at, RegionId id) {
    const Section& section = program_.sections[section_at];
    Ran& ran = ran_[index(id)];
    if (ran.section == static_cast<int64_t>(section_at)) {
      fail_instr(program_, section, at, "runs a second time in this section. Remove one of them.");
    }
    if (ran.section >= 0 && ran.graph != section.graph) {
      fail_instr(program_, section, at,
                 "belongs to graph " + std::to_string(ran.graph) +
                     ", which ran it before. Give each graph its own regions.");
    }
    const Region& region = program_.region(id);
    if (ran.section >= 0 && region.once) {
      fail_instr(program_, section, at,
                 "ran before, and draws random numbers or writes to its inputs: again would not "
                 "be the same. Keep its outputs.");
    }
    ++runs_;
    ran = {static_cast<int64_t>(section_at), section.graph, ran.section < 0 ? runs_ : ran.place};
    for (const Operand& operand : region.inputs) {
      const auto* value = std::get_if<ValueId>(&operand);
      if (value == nullptr) continue;
      use(section, at, *value);
      Written& written = written_[index(*value)];
      if (written.by && ran.place < written.place) {
        fail_instr(program_, section, at,
                   "ran before `run " + program_.region(*written.by).name +
                       "`, which may write to " + program_.value(*value).name +
                       ": again would not be the same. Keep its outputs.");
      }
      if (region.once && !made_[index(*value)].region) written = {runs_, id};
    }
    for (ValueId out : region.outputs) make(section_at, at, id, out);
  }

  void make(size_t section_at, size_t at, RegionId region, ValueId id) {
    const Section& section = program_.sections[section_at];
    Made& made = made_[index(id)];
    // Running a region again, in a later section, makes the same values again.
    const bool again = made.region == region && made.section != static_cast<int64_t>(section_at);
    if (made.section >= 0 && !again) {
      fail_instr(program_, section, at,
                 "makes " + program_.value(id).name + ", which is made already, " + maker(id) +
                     ". One value has one maker: rename one.");
    }
    if (program_.value(id).grad_of && section.kind != SectionKind::kBackward) {
      fail_instr(program_, section, at,
                 "makes the gradient " + program_.value(id).name +
                     ". Gradients are made in backward sections: run it there.");
    }
    made = {static_cast<int64_t>(section_at), region};
  }

  bool available(const Section& section, ValueId id) const {
    const Made& made = made_[index(id)];
    return made.section >= 0 &&
           program_.sections[static_cast<size_t>(made.section)].graph == section.graph;
  }

  void use(const Section& section, size_t at, ValueId id) const {
    if (available(section, id)) return;
    const bool elsewhere = made_[index(id)].section >= 0;
    fail_instr(program_, section, at,
               "uses " + program_.value(id).name +
                   (elsewhere ? ", which another graph makes. Pass it as this section's input."
                              : " before it is made. Run the region that makes it first, or list "
                                "it as an input of the section."));
  }

  std::string maker(ValueId id) const {
    const Made& made = made_[index(id)];
    if (made.region) return "by region " + program_.region(*made.region).name;
    return "as an input of " + section_name(program_.sections[static_cast<size_t>(made.section)]);
  }

  const StepProgram& program_;
  std::vector<Made> made_;        // by value
  std::vector<Written> written_;  // by value
  std::vector<Ran> ran_;          // by region
  size_t runs_ = 0;               // so far
};

}  // namespace

void verify_structure(const StepProgram& program) {
  StructureVerifier(program).verify();
  verify_rows(program);
}

}  // namespace deepcompile
