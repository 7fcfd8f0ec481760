// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <chrono>
#include <utility>

#include "base/error.h"
#include "bind.h"
#include "ir/verifier.h"
#include "pass_library.h"
#include "passes/pipeline.h"
#include "report/next_best.h"
#include "sim.h"

namespace deepcompile::bindings {
namespace {

// The context of a pass written in Python. Holds the program that the pass
// edits, which outlives the call if Python keeps it.
struct PythonContext {
  ProgramPtr program;
  std::string pass;
  // Emptied when the pass returns: what it points to lives no longer.
  std::shared_ptr<PassEnvironment> environment;

  // `given`: a name of the program's, or the model's own.
  void because(const std::string& given, std::string text) const {
    const bool known = given.empty() || program->find_param(given) || program->find_region(given);
    const std::string object = known ? given : ir_name(given);
    if (known || program->find_param(object)) return add(object, std::move(text));
    for (const Param& param : program->params) {  // small ones are packed
      const auto& members = param.members;
      if (std::find(members.begin(), members.end(), object) == members.end()) continue;
      return add(param.name, object + ": " + text);
    }
    throw UserError("[passes] " + pass + ": because(\"" + given +
                    "\"): no parameter or region of that name. Use \"\" for the whole step.");
  }

  void add(const std::string& object, std::string text) const {
    if (environment->reasons) program->reasons.push_back({pass, object, std::move(text)});
  }

  // (ns, bytes) of a simulated step.
  std::optional<std::pair<int64_t, int64_t>> simulate(const StepProgram& edited) const {
    if (environment->simulator == nullptr) return std::nullopt;
    verify(edited);
    const SimSummary summary = environment->simulate(edited);
    return std::pair{summary.time.value, summary.peak.value};
  }

  std::optional<int64_t> duration(const InstrNames& names) const {
    if (environment->estimator == nullptr) return std::nullopt;
    return environment->estimator->duration(*program, from_names(*program, names)).value;
  }
};

struct PassInfo {
  std::string name, summary;
  Contract contract;
};

std::vector<Fact> facts_from(const py::handle& words) {
  std::vector<Fact> facts;
  for (const auto& word : py::cast<std::vector<std::string>>(words)) {
    const auto fact = parse_fact(word);
    if (!fact) {
      std::string known;
      for (int i = 0; i < kFactCount; ++i) {
        known += (i == 0 ? "" : ", ") + std::string(to_string(static_cast<Fact>(i)));
      }
      throw UserError("[passes] contract: unknown fact " + word + ". Known: " + known + ".");
    }
    facts.push_back(*fact);
  }
  return facts;
}

std::vector<std::string> words_of(const std::vector<Fact>& facts) {
  std::vector<std::string> words;
  for (Fact fact : facts) words.emplace_back(to_string(fact));
  return words;
}

py::object of_module(const char* name) {
  return py::module_::import("deepcompile._core").attr(name);
}

Contract contract_of(const py::object& callable) {
  const py::object contract = py::getattr(callable, "contract", py::none());
  if (contract.is_none()) return {};
  if (!py::isinstance<Contract>(contract)) {
    throw UserError("[passes] contract of " + std::string(py::repr(callable)) +
                    ": must be a deepcompile._core.PassContract.");
  }
  return contract.cast<Contract>();
}

// The exception that a pass raised, with the pass in front; the traceback is its cause.
[[noreturn]] void raise_of(py::error_already_set& error, const std::string& pass) {
  const bool theirs = error.matches(PyExc_Exception) && !error.matches(of_module("InternalError"));
  if (!theirs) throw error;  // an interrupt, say
  const std::string front = "[passes] " + pass + ": ";
  const std::string said = py::cast<std::string>(py::str(error.value()));
  const py::object user_error = of_module("UserError");
  const bool ours = error.matches(user_error);
  if (ours && said.starts_with(front)) throw error;
  const std::string kind = py::cast<std::string>(error.type().attr("__name__"));
  const std::string text = ours ? front + said
                                : front + "raised " + kind + ": " + said +
                                      ". A pass is a function of (program, context).";
  py::raise_from(error, user_error.ptr(), text.c_str());
  throw py::error_already_set();
}

// Python edits a copy, so that views it keeps stay good and an exception
// leaves the program as it was.
std::unique_ptr<Pass> python_pass(const py::object& callable) {
  py::object word = py::getattr(callable, "pass_name", py::none());
  if (word.is_none()) word = py::getattr(callable, "__name__", py::none());
  if (word.is_none()) word = py::type::handle_of(callable).attr("__name__");
  const std::string name = py::cast<std::string>(word);
  auto run = [callable, name](StepProgram& program, PassContext& context) {
    auto copy = std::make_shared<StepProgram>(program);
    const auto environment = std::make_shared<PassEnvironment>(context.environment());
    struct Closer {
      PassEnvironment& environment;
      ~Closer() { environment = {}; }
    } closer{*environment};
    try {
      callable(copy, PythonContext{copy, name, environment});
    } catch (py::error_already_set& error) {
      raise_of(error, name);
    }
    check_tables(program, *copy, "[passes] " + name);
    program = *copy;
  };
  return make_pass(name, contract_of(callable), std::move(run));
}

// A class is a pass by its objects.
py::object object_of(const py::object& cls) {
  try {
    return cls();
  } catch (py::error_already_set& error) {
    raise_of(error, py::cast<std::string>(cls.attr("__name__")));
  }
}

// The pass that `item` stands for: a built-in's name or its object of
// deepcompile.passes, a pass of a loaded library, or something to call.
// `owned` keeps what is made here.
const Pass& pass_of(const py::object& item, const PassRegistry& registry,
                    std::vector<std::shared_ptr<const Pass>>& owned) {
  if (py::isinstance<py::str>(item)) return registry.get(py::cast<std::string>(item));
  const py::object native = py::getattr(item, "native", item);
  if (py::isinstance<LoadedPass>(native)) {
    owned.push_back(native.cast<const LoadedPass&>().pass);
    return *owned.back();
  }
  if (py::isinstance<py::str>(native)) return registry.get(py::cast<std::string>(native));
  if (PyCallable_Check(item.ptr()) == 0) {
    throw UserError("[passes] " + std::string(py::repr(item)) +
                    ": is neither a pass's name nor a function of (program, context).");
  }
  owned.push_back(python_pass(PyType_Check(item.ptr()) != 0 ? object_of(item) : item));
  return *owned.back();
}

// Another pass, in the same environment. Its reasons are its own.
void run_in(const PythonContext& context, const ProgramPtr& program, const py::object& item) {
  const PassRegistry registry = PassRegistry::with_builtins();
  std::vector<std::shared_ptr<const Pass>> owned;
  PipelineOptions options;
  options.environment = *context.environment;
  run_pipeline(*program, {&pass_of(item, registry, owned)}, options);
}

// What passes may ask of a machine; `costs` outlives it.
PassEnvironment environment_of(const Estimator* costs, std::optional<int64_t> memory_budget) {
  if (memory_budget && *memory_budget <= 0) {
    throw UserError("[passes] memory_budget: " + std::to_string(*memory_budget) +
                    " bytes. Give what one rank can allocate, above zero.");
  }
  PassEnvironment environment;
  if (memory_budget) environment.memory_budget = Bytes{*memory_budget};
  if (costs == nullptr) return environment;
  environment.estimator = costs;
  environment.simulator = simulate_summary;
  return environment;
}

std::vector<PassRecord> run_passes(StepProgram& program, const std::vector<py::object>& list,
                                   const Machine* machine, std::optional<int64_t> memory_budget,
                                   const CostTable* costs, bool early_updates,
                                   const StepProgram* held) {
  const PassRegistry registry = PassRegistry::with_builtins();
  std::vector<std::shared_ptr<const Pass>> owned;
  std::vector<const Pass*> passes;
  for (const py::object& item : list) passes.push_back(&pass_of(item, registry, owned));
  if (costs != nullptr && machine == nullptr) {
    throw UserError(
        "[passes] costs: a cost table needs a machine for what it has not measured. "
        "Give `machine` too.");
  }
  std::unique_ptr<const Estimator> estimator;
  if (machine != nullptr) estimator = estimator_of(*machine, costs);
  PipelineOptions options;
  options.environment = environment_of(estimator.get(), memory_budget);
  options.environment.early_updates = early_updates;
  options.environment.held = held;
  options.clock = [] {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    return Nanos{std::chrono::duration_cast<std::chrono::nanoseconds>(now).count()};
  };
  return run_pipeline(program, passes, options);
}

std::vector<Alternative> alternatives_of(const StepProgram& plain, const StepProgram& plan,
                                         const Machine& machine,
                                         std::optional<int64_t> memory_budget,
                                         const CostTable* costs, bool early_updates) {
  const std::unique_ptr<const Estimator> estimator = estimator_of(machine, costs);
  PassEnvironment environment = environment_of(estimator.get(), memory_budget);
  environment.early_updates = early_updates;
  return next_best(plain, plan, environment);
}

PassInfo pass_info(const std::string& name) {
  const PassRegistry registry = PassRegistry::with_builtins();
  const Pass& pass = registry.get(name);
  return {std::string(pass.name()), std::string(pass.summary()), pass.contract()};
}

void bind_classes(py::module_& m) {
  py::class_<Contract>(m, "PassContract",
                       "What a pass wants and gives, as facts: gathers_placed, reductions_placed,\n"
                       "updates_placed, regions_timed. Set it as the function's `contract`.")
      .def(py::init([](const py::object& needs, const py::object& provides,
                       const py::object& conflicts) {
             return Contract{facts_from(needs), facts_from(provides), facts_from(conflicts)};
           }),
           py::arg("needs") = py::tuple(), py::arg("provides") = py::tuple(),
           py::arg("conflicts") = py::tuple())
      .def_property_readonly("needs", [](const Contract& c) { return words_of(c.needs); })
      .def_property_readonly("provides", [](const Contract& c) { return words_of(c.provides); })
      .def_property_readonly("conflicts", [](const Contract& c) { return words_of(c.conflicts); });

  py::class_<PassInfo>(m, "PassInfo", "A built-in pass.")
      .def_readonly("name", &PassInfo::name)
      .def_readonly("summary", &PassInfo::summary)
      .def_readonly("contract", &PassInfo::contract);

  py::class_<PythonContext>(m, "PassContext", "What a pass written in Python gets.")
      .def_readonly("pass_name", &PythonContext::pass)
      .def("because", &PythonContext::because, py::arg("object"), py::arg("text"),
           "Records why: `object` is a parameter's or region's name, or '' for the step.")
      .def_property_readonly(
          "memory_budget",
          [](const PythonContext& c) -> std::optional<int64_t> {
            const auto& budget = c.environment->memory_budget;
            return budget ? std::optional(budget->value) : std::nullopt;
          },
          "Most bytes of one rank, or None.")
      .def_property_readonly(
          "early_updates", [](const PythonContext& c) { return c.environment->early_updates; },
          "Whether a backward may update.")
      .def("simulate", &PythonContext::simulate, py::arg("program"),
           "(ns, peak bytes) of a step of `program` on the machine that is planned for; None if\n"
           "no machine is known.")
      .def("run", &run_in, py::arg("program").none(false), py::arg("pass_"),
           "Runs another pass on `program` under the same memory budget and machine.")
      .def("duration_ns", &PythonContext::duration, py::arg("instr"),
           "What an Instr takes there when nothing disturbs it, or None.");

  py::class_<PassRecord>(m, "PassRecord", "One line of a pass log.")
      .def_readonly("number", &PassRecord::number)
      .def_readonly("pass_name", &PassRecord::pass)
      .def_readonly("changed", &PassRecord::changed)
      .def_readonly("instrs_before", &PassRecord::instrs_before)
      .def_readonly("instrs_after", &PassRecord::instrs_after)
      .def_readonly("reasons", &PassRecord::reasons, "Choices recorded.")
      .def_property_readonly("time_ns",
                             [](const PassRecord& r) -> std::optional<int64_t> {
                               return r.time ? std::optional(r.time->value) : std::nullopt;
                             })
      .def("__str__", [](const PassRecord& r) {
        std::string text = print(std::vector<PassRecord>{r});
        while (!text.empty() && text.back() == '\n') text.pop_back();
        return text;
      });
}

void bind_next_best(py::module_& m) {
  py::class_<Alternative>(m, "Alternative", "Another choice, and what it would have cost.")
      .def_readonly("objects", &Alternative::objects,
                    "Names of the parameters or regions that are alike; empty for the step.")
      .def_readonly("chosen", &Alternative::chosen, "What the plan does.")
      .def_readonly("instead", &Alternative::instead)
      .def_property_readonly(
          "time_ns", [](const Alternative& a) { return a.time.value; }, "More a step.")
      .def_property_readonly(
          "peak_bytes", [](const Alternative& a) { return a.peak.value; }, "More at the peak.")
      .def_readonly("fits", &Alternative::fits, "Within the memory budget.")
      .def("__str__", [](const Alternative& a) { return print(a); });
  m.def("next_best", &alternatives_of, py::arg("plain"), py::arg("plan"), py::arg("machine"),
        py::arg("memory_budget") = py::none(), py::arg("costs") = nullptr,
        py::arg("early_updates") = false,
        "What every single other choice would have cost: a list of Alternative, for `explain`.\n"
        "`plan` was made from the compute-only program `plain` by passes; the rest is as for\n"
        "run_passes. Objects that are alike are asked about once.");
}

}  // namespace

void bind_passes(py::module_& m) {
  bind_classes(m);
  bind_next_best(m);
  m.def("run_passes", &run_passes, py::arg("program"), py::arg("passes"),
        py::arg("machine") = nullptr, py::arg("memory_budget") = py::none(),
        py::arg("costs") = nullptr, py::arg("early_updates") = false, py::arg("held") = nullptr,
        "Runs passes in order and returns their log, a list of PassRecord. Each is a built-in's\n"
        "name, an object of deepcompile.passes, a LoadedPass, or a function of (program, context)\n"
        "or a class whose objects are. Contracts are checked before the first runs;\n"
        "the program is verified after each, and is as it was if anything raises.\n"
        "`machine` (a Machine), `costs` (a CostTable: measurements that go before the machine's\n"
        "numbers) and `memory_budget` (bytes a rank) are for passes that ask what a choice costs;\n"
        "`early_updates` says whether a backward may update; `held`, the plan of the same step\n"
        "that holds, with its reasons, is one that `auto` does no worse than.");
  m.def(
      "pass_names", [] { return PassRegistry::with_builtins().names(); },
      "Names of the built-in passes.");
  m.def("pass_info", &pass_info, py::arg("name"), "Summary and contract of a built-in pass.");
}

}  // namespace deepcompile::bindings
