// SPDX-License-Identifier: Apache-2.0
#include <pybind11/operators.h>

#include <charconv>

#include "analysis/memory_timeline.h"
#include "base/error.h"
#include "bind.h"
#include "ir/merge_steps.h"
#include "ir/split_step.h"
#include "ir/text.h"
#include "ir/transplant.h"
#include "ir/verifier.h"

namespace deepcompile::bindings {
namespace {

// Views of one row of a program's tables. They hold the program, not the row,
// so that adding rows does not invalidate them.
struct ParamView {
  ProgramPtr program;
  ParamId id;
  const Param& get() const { return program->param(id); }
};
struct ValueView {
  ProgramPtr program;
  ValueId id;
  const Value& get() const { return program->value(id); }
};
struct RegionView {
  ProgramPtr program;
  RegionId id;
  const Region& get() const { return program->region(id); }
};
struct SectionView {
  ProgramPtr program;
  size_t position;
  Section& get() const { return program->sections.at(position); }
};

template <typename View, typename Id>
std::vector<View> views(const ProgramPtr& program, size_t count) {
  std::vector<View> result;
  result.reserve(count);
  for (size_t i = 0; i < count; ++i) result.push_back({program, static_cast<Id>(i)});
  return result;
}

// "embed" or "small[3]".
ParamRef param_ref(const StepProgram& program, const std::string& text) {
  const size_t bracket = text.find('[');
  const auto id = program.find_param(text.substr(0, bracket));
  if (!id) throw UserError("[ir] operand " + text + ": no such parameter or value. Add it first.");
  ParamRef ref{*id, 0};
  if (bracket == std::string::npos) return ref;
  const char* first = text.data() + bracket + 1;
  const char* last = text.data() + text.size();
  const auto [end, error] = std::from_chars(first, last, ref.member);
  if (error != std::errc() || end + 1 != last || *end != ']') {
    throw UserError("[ir] operand " + text + ": not a member. Write it like small[3].");
  }
  if (ref.member >= program.param(*id).members.size()) {
    throw UserError("[ir] operand " + text + ": the parameter has " +
                    std::to_string(program.param(*id).members.size()) + " members.");
  }
  return ref;
}

Operand operand_from(const StepProgram& program, const std::string& text) {
  if (const auto value = program.find_value(text)) return *value;
  return param_ref(program, text);
}

std::string add_param(StepProgram& program, std::string name, const std::string& dtype,
                      int64_t numel, const std::string& placement, bool trainable,
                      std::vector<std::string> members) {
  const auto place = parse_placement(placement);
  if (!place) {
    throw UserError("[ir] param " + name + ": unknown placement " + placement +
                    ". Use sharded, whole or replicated.");
  }
  program.add_param({name, dtype_from(dtype), numel, *place, trainable, std::move(members)});
  return name;
}

std::string add_value(StepProgram& program, std::string name, int64_t bytes,
                      const std::optional<std::string>& grad_of) {
  Value value{name, Bytes{bytes}, {}};
  if (grad_of) value.grad_of = param_ref(program, *grad_of);
  program.add_value(std::move(value));
  return name;
}

std::string add_region(StepProgram& program, std::string name, uint32_t code,
                       const std::vector<std::string>& inputs,
                       const std::vector<std::string>& outputs, int64_t workspace, int64_t moved,
                       int64_t flops, bool once, bool checkpoint) {
  Region region;
  region.name = name;
  region.code = code;
  for (const std::string& input : inputs) region.inputs.push_back(operand_from(program, input));
  region.outputs = values_from(program, outputs);
  region.workspace = {workspace};
  region.moved = {moved};
  region.flops = flops;
  region.once = once;
  region.checkpoint = checkpoint;
  program.add_region(std::move(region));
  return name;
}

void read_rows(StepProgram& program, const std::string& name, const std::string& param,
               int64_t row) {
  const auto id = program.find_value(name);
  if (!id) throw UserError("[ir] value " + name + ": unknown. Add it with add_value first.");
  program.read_rows(*id, {param_ref(program, param).param, row});
}

void set_region_time(StepProgram& program, const std::string& name, std::optional<int64_t> nanos) {
  const auto id = program.find_region(name);
  if (!id) throw UserError("[ir] region " + name + ": unknown. Add it with add_region first.");
  if (nanos && *nanos < 0) throw UserError("[ir] region " + name + ": its time is negative.");
  Region& region = program.regions[index(*id)];
  region.time = nanos ? std::optional(Nanos{*nanos}) : std::nullopt;
}

void set_region_workspace(StepProgram& program, const std::string& name, int64_t bytes) {
  const auto id = program.find_region(name);
  if (!id) throw UserError("[ir] region " + name + ": unknown. Add it with add_region first.");
  if (bytes < 0) throw UserError("[ir] region " + name + ": workspace must be 0 bytes or more.");
  program.regions[index(*id)].workspace = {bytes};
}

SectionView add_section(const ProgramPtr& program, const std::string& kind, uint32_t graph,
                        const std::vector<std::string>& inputs,
                        const std::vector<std::string>& outputs) {
  const auto parsed = parse_section_kind(kind);
  if (!parsed) {
    throw UserError("[ir] section " + kind +
                    ": unknown kind. Use forward, backward, inference or update.");
  }
  Section section{
      *parsed, graph, values_from(*program, inputs), values_from(*program, outputs), {}};
  program->sections.push_back(std::move(section));
  return {program, program->sections.size() - 1};
}

void bind_param(py::module_& m) {
  py::class_<ParamView>(m, "Param", "What is gathered, reduced and updated as one. Read only.")
      .def_property_readonly("name", [](const ParamView& v) { return v.get().name; })
      .def_property_readonly("dtype", [](const ParamView& v) { return to_string(v.get().dtype); })
      .def_property_readonly(
          "numel", [](const ParamView& v) { return v.get().numel; },
          "Elements of the flat buffer, before padding.")
      .def_property_readonly(
          "placement", [](const ParamView& v) { return to_string(v.get().placement); },
          "'sharded', 'whole' or 'replicated'.")
      .def_property_readonly("trainable", [](const ParamView& v) { return v.get().trainable; })
      .def_property_readonly(
          "members", [](const ParamView& v) { return v.get().members; },
          "Names of the nn.Parameters inside.")
      .def_property_readonly(
          "full_bytes", [](const ParamView& v) { return v.program->full_bytes(v.id).value; },
          "Bytes when whole, padded to the world size.")
      .def_property_readonly(
          "shard_bytes", [](const ParamView& v) { return v.program->shard_bytes(v.id).value; },
          "Bytes of one rank's shard of the weights.")
      .def_property_readonly(
          "rows_read", [](const ParamView& v) { return v.program->rows_read(v.id); },
          "Most rows that a micro batch reads on one rank, if only those are exchanged; else 0.")
      .def_property_readonly(
          "gather_bytes", [](const ParamView& v) { return v.program->gather_bytes(v.id).value; },
          "What a gather moves between the ranks: bytes of a whole, or of all ranks' rows.")
      .def_property_readonly(
          "reduce_bytes", [](const ParamView& v) { return v.program->reduce_bytes(v.id).value; },
          "What a reduction moves, in the program's reduce_dtype.")
      .def("__repr__", [](const ParamView& v) { return "<Param " + v.get().name + ">"; });
}

void bind_value(py::module_& m) {
  py::class_<ValueView>(m, "Value", "A tensor that flows between regions. Read only.")
      .def_property_readonly("name", [](const ValueView& v) { return v.get().name; })
      .def_property_readonly("bytes", [](const ValueView& v) { return v.get().bytes.value; })
      .def_property_readonly(
          "grad_of",
          [](const ValueView& v) -> std::optional<std::string> {
            if (!v.get().grad_of) return std::nullopt;
            return print(*v.program, Operand(*v.get().grad_of));
          },
          "The member it is the gradient of, as 'embed' or 'small[3]', or None.")
      .def_property_readonly(
          "rows_of",
          [](const ValueView& v) -> std::optional<std::string> {
            if (!v.get().rows_of) return std::nullopt;
            return v.program->param(v.get().rows_of->param).name;
          },
          "The parameter whose rows it numbers, if only those are exchanged, or None.")
      .def("__repr__", [](const ValueView& v) { return "<Value " + v.get().name + ">"; });
}

void bind_region(py::module_& m) {
  py::class_<RegionView>(m, "Region", "One call of a compiled piece of the graph. Read only.")
      .def_property_readonly("name", [](const RegionView& v) { return v.get().name; })
      .def_property_readonly(
          "code", [](const RegionView& v) { return v.get().code; },
          "Index of the compiled function; equal regions share it.")
      .def_property_readonly(
          "inputs",
          [](const RegionView& v) {
            std::vector<std::string> names;
            for (const Operand& operand : v.get().inputs) {
              names.push_back(print(*v.program, operand));
            }
            return names;
          },
          "Values and parameter members, in call order.")
      .def_property_readonly(
          "outputs", [](const RegionView& v) { return names_of(*v.program, v.get().outputs); })
      .def_property_readonly(
          "workspace", [](const RegionView& v) { return v.get().workspace.value; },
          "Bytes of scratch alive only while it runs.")
      .def_property_readonly(
          "moved", [](const RegionView& v) { return v.get().moved.value; },
          "Bytes of device memory traffic.")
      .def_property_readonly("flops", [](const RegionView& v) { return v.get().flops; })
      .def_property_readonly(
          "time",
          [](const RegionView& v) -> std::optional<int64_t> {
            const auto& time = v.get().time;
            return time ? std::optional(time->value) : std::nullopt;
          },
          "Nanoseconds, measured or filled in; None if unknown.")
      .def_property_readonly(
          "once", [](const RegionView& v) { return v.get().once; },
          "Draws random numbers or writes to its inputs: never run again.")
      .def_property_readonly(
          "checkpoint", [](const RegionView& v) { return v.get().checkpoint; },
          "The user marked it for recomputation.")
      .def("__repr__", [](const RegionView& v) { return "<Region " + v.get().name + ">"; });
}

void bind_reason(py::module_& m) {
  py::class_<Reason>(m, "Reason", "Why a pass chose what it chose.")
      .def_readonly("pass_name", &Reason::pass)
      .def_readonly("object", &Reason::object,
                    "A parameter's or region's name, or '' for the whole step.")
      .def_readonly("text", &Reason::text)
      .def("__repr__", [](const Reason& r) {
        return "<Reason " + r.pass + " " + r.object + ": " + r.text + ">";
      });
}

void bind_instr(py::module_& m) {
  py::class_<InstrNames>(m, "Instr", "One instruction of a section, by names.")
      .def(py::init([](std::string op, std::optional<std::string> operand,
                       std::vector<std::string> values) {
             return InstrNames{std::move(op), std::move(operand), std::move(values)};
           }),
           py::arg("op"), py::arg("operand") = py::none(),
           py::arg("values") = std::vector<std::string>{},
           "op: gather, wait, release, run, reduce, accumulate, norm or update.")
      .def_readonly("op", &InstrNames::op)
      .def_readonly("operand", &InstrNames::operand,
                    "Name of the parameter, or of the region of a run; None for norm.")
      .def_property_readonly(
          "param", [](const InstrNames& i) { return i.op == "run" ? std::nullopt : i.operand; },
          "Name of the parameter, or None.")
      .def_property_readonly(
          "region", [](const InstrNames& i) { return i.op == "run" ? i.operand : std::nullopt; },
          "Name of the region, or None.")
      .def_readonly("values", &InstrNames::values, "Gradients, for reduce.")
      .def(py::self == py::self)
      .def("__hash__",
           [](const InstrNames& i) {
             return py::hash(py::make_tuple(i.op, i.operand, py::tuple(py::cast(i.values))));
           })
      .def("__repr__", [](const InstrNames& i) {
        std::string text = i.op + (i.operand ? " " + *i.operand : "");
        for (size_t v = 0; v < i.values.size(); ++v) text += (v ? ", " : " (") + i.values[v];
        return i.values.empty() ? text : text + ")";
      });
}

void bind_section(py::module_& m) {
  py::class_<SectionView>(m, "Section", "A part of a step. A view: edits change the program.")
      .def_property_readonly(
          "kind", [](const SectionView& v) { return to_string(v.get().kind); },
          "'forward', 'backward', 'inference' or 'update'.")
      .def_property_readonly("graph", [](const SectionView& v) { return v.get().graph; })
      .def_property_readonly(
          "name", [](const SectionView& v) { return section_name(v.get()); },
          "As in reports: 'forward 0', 'update'.")
      .def_property_readonly(
          "inputs", [](const SectionView& v) { return names_of(*v.program, v.get().inputs); })
      .def_property_readonly(
          "outputs", [](const SectionView& v) { return names_of(*v.program, v.get().outputs); })
      .def_property_readonly(
          "instrs",
          [](const SectionView& v) {
            std::vector<InstrNames> instrs;
            for (const Instr& instr : v.get().instrs) {
              instrs.push_back(to_names(*v.program, instr));
            }
            return instrs;
          },
          "A copy of the instructions; set_instrs puts a list back.")
      .def(
          "set_instrs",
          [](const SectionView& v, const std::vector<InstrNames>& list) {
            std::vector<Instr> instrs;
            for (const InstrNames& names : list) instrs.push_back(from_names(*v.program, names));
            v.get().instrs = std::move(instrs);
          },
          py::arg("instrs"), "Replaces all instructions. Nothing changes if one is wrong.")
      .def(
          "add",
          [](const SectionView& v, std::string op, std::optional<std::string> operand,
             std::vector<std::string> values) {
            const InstrNames names{std::move(op), std::move(operand), std::move(values)};
            v.get().instrs.push_back(from_names(*v.program, names));
          },
          py::arg("op"), py::arg("operand") = py::none(),
          py::arg("values") = std::vector<std::string>{}, "Appends one instruction.")
      .def(
          "run",
          [](const SectionView& v, const std::string& region) {
            v.get().instrs.push_back(from_names(*v.program, {"run", region, {}}));
          },
          py::arg("region"), "Appends a run of the region.")
      .def("__repr__",
           [](const SectionView& v) { return "<Section " + section_name(v.get()) + ">"; });
}

void bind_program_building(py::class_<StepProgram, ProgramPtr>& program) {
  program.def(
      "add_param", &add_param, py::arg("name"), py::arg("dtype"), py::arg("numel"),
      py::arg("placement") = "sharded", py::arg("trainable") = true,
      py::arg("members") = std::vector<std::string>{},
      "Adds a parameter of `numel` elements and returns its name. Without `members` it has\n"
      "one, of its own name.");
  program.def("add_value", &add_value, py::arg("name"), py::arg("bytes"),
              py::arg("grad_of") = py::none(),
              "Adds a value and returns its name. grad_of: 'embed' or 'small[3]'.");
  program.def("read_rows", &read_rows, py::arg("value"), py::arg("param"), py::arg("row"),
              "Lets a forward's input number the rows of `row` elements that its graph reads of\n"
              "a sharded parameter: only these are gathered and reduced.");
  program.def("forget_rows", &StepProgram::forget_rows, "Exchanges all parameters whole again.");
  program.def("add_region", &add_region, py::arg("name"), py::arg("code"), py::arg("inputs"),
              py::arg("outputs"), py::arg("workspace") = 0, py::arg("moved") = 0,
              py::arg("flops") = 0, py::arg("once") = false, py::arg("checkpoint") = false,
              "Adds a region and returns its name. Inputs are values and parameter members\n"
              "('embed', 'small[3]') in call order; workspace and moved are bytes. once: it must\n"
              "never run again; checkpoint: the user marked it for recomputation.");
  program.def("set_region_time", &set_region_time, py::arg("name"), py::arg("nanos"),
              "Sets a region's measured time; None forgets it.");
  program.def("set_region_workspace", &set_region_workspace, py::arg("name"), py::arg("bytes"),
              "Sets a region's scratch memory, as measured.");
  program.def("add_section", &add_section, py::arg("kind"), py::arg("graph"), py::arg("inputs"),
              py::arg("outputs"), "Appends an empty section and returns it.");
  program.def(
      "because",
      [](StepProgram& p, std::string pass, std::string object, std::string text) {
        p.reasons.push_back({std::move(pass), std::move(object), std::move(text)});
      },
      py::arg("pass_name"), py::arg("object"), py::arg("text"), "Records one reason.");
}

void bind_program(py::module_& m) {
  py::class_<StepProgram, ProgramPtr> program(
      m, "StepProgram", "One training step as data. str(program) is its text form.");
  program.def(py::init<>())
      .def_static(
          "parse",
          [](const std::string& text, const std::string& source) {
            return std::make_shared<StepProgram>(parse_program(text, source));
          },
          py::arg("text"), py::arg("source") = "program",
          "Reads the text form. `source` names it in errors, before line and column.")
      .def("__str__", [](const StepProgram& p) { return print(p); })
      .def(
          "copy", [](const StepProgram& p) { return std::make_shared<StepProgram>(p); },
          "An independent copy.")
      .def(
          "verify", [](const StepProgram& p) { verify(p); },
          "Raises UserError if the program is not valid.")
      .def(
          "verify_plan", [](const StepProgram& p) { verify_plan(p); },
          "As verify, and also if its transfers are incomplete: what freeze demands.")
      .def_readwrite("name", &StepProgram::name)
      .def_readwrite("world", &StepProgram::world, "Ranks that share the parameters.")
      .def_readwrite("accumulation", &StepProgram::accumulation,
                     "Forward/backward repeats before the update.")
      .def_readwrite("clip", &StepProgram::clip, "The update needs the global norm first.")
      .def_readwrite("boundary", &StepProgram::boundary,
                     "Gradients are summed locally and reduced in the last micro batch alone.")
      .def_property(
          "reduce_dtype", [](const StepProgram& p) { return to_string(p.reduce_dtype); },
          [](StepProgram& p, const std::string& word) { p.reduce_dtype = dtype_from(word); },
          "Element type of gradients on the wire.")
      .def_property_readonly(
          "params",
          [](const ProgramPtr& p) { return views<ParamView, ParamId>(p, p->params.size()); })
      .def_property_readonly(
          "values",
          [](const ProgramPtr& p) { return views<ValueView, ValueId>(p, p->values.size()); })
      .def_property_readonly(
          "regions",
          [](const ProgramPtr& p) { return views<RegionView, RegionId>(p, p->regions.size()); })
      .def_property_readonly(
          "sections",
          [](const ProgramPtr& p) { return views<SectionView, size_t>(p, p->sections.size()); })
      .def_readonly("reasons", &StepProgram::reasons);
  bind_program_building(program);
}

// How the parts of a step become one, and one becomes theirs again.
void bind_steps(py::module_& m) {
  m.def(
      "merge_steps",
      [](std::string name, const std::vector<ProgramPtr>& graphs, const StepProgram& update) {
        std::vector<StepProgram> copies;
        for (const ProgramPtr& graph : graphs) copies.push_back(*graph);
        return std::make_shared<StepProgram>(merge_steps(std::move(name), copies, update));
      },
      py::arg("name"), py::arg("graphs"), py::arg("update"),
      "One step of all graphs' programs and the update's. Graph k becomes number k.");
  m.def(
      "split_step",
      [](const StepProgram& merged, const std::vector<ProgramPtr>& graphs,
         const StepProgram& update) {
        std::vector<StepProgram> copies;
        for (const ProgramPtr& graph : graphs) copies.push_back(*graph);
        std::vector<ProgramPtr> parts;
        for (StepProgram& part : split_step(merged, copies, update)) {
          parts.push_back(std::make_shared<StepProgram>(std::move(part)));
        }
        return parts;
      },
      py::arg("merged"), py::arg("graphs"), py::arg("update"),
      "The programs of merge_steps with the merged program's instructions; the update's last.");
  m.def("ir_name", &ir_name, py::arg("name"),
        "A parameter's name as a program writes it: [A-Za-z_][A-Za-z0-9_.:/-]*.");
  m.def("skeleton", &skeleton, py::arg("program"),
        "Hash of what ranks must share: which parameters each section's runs read, and which\n"
        "gradients they make, in order. No sizes.");
  m.def("structure", &structure, py::arg("program"),
        "Hash of the skeleton and of which value each region reads and makes.");
  m.def(
      "transplant",
      [](const StepProgram& agreed, const StepProgram& plain) {
        return std::make_shared<StepProgram>(transplant(agreed, plain));
      },
      py::arg("agreed"), py::arg("plain"),
      "The compute-only `plain` with the instructions of `agreed`, whose skeleton it shares.\n"
      "If the structure differs, recomputation and moves of values are left out.");
}

}  // namespace

void bind_ir(py::module_& m) {
  bind_param(m);
  bind_value(m);
  bind_region(m);
  bind_reason(m);
  bind_instr(m);
  bind_section(m);
  bind_program(m);
  bind_steps(m);
  m.def("collective_order", &collective_order, py::arg("program"),
        "The step's collectives in order, as 'backward 0: reduce L0.q'. Equal on all ranks\n"
        "that may run together.");
  m.def("order_difference", &order_difference, py::arg("a"), py::arg("b"),
        "What differs first between two collective orders, in words; None if nothing.");
  m.def(
      "memory_timeline",
      [](const StepProgram& program) {
        verify(program);
        const MemoryTimeline timeline = memory_timeline(program);
        py::list points;
        for (const MemoryAt& at : timeline.points) {
          points.append(py::make_tuple(at.section, at.instr, at.during.value, at.after.value));
        }
        py::dict result;
        result["base"] = timeline.base.value;
        result["peak"] = timeline.peak.value;
        result["peak_point"] = timeline.peak_point;
        result["points"] = points;
        return result;
      },
      py::arg("program"),
      "Bytes a rank needs in program order, whatever the machine's speed: 'base' between\n"
      "steps, 'peak', 'peak_point' (index), 'points' [(section, instr, during, after)].");
}

}  // namespace deepcompile::bindings
