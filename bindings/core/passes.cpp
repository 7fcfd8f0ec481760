// SPDX-License-Identifier: Apache-2.0
#include <chrono>
#include <utility>

#include "base/error.h"
#include "bind.h"
#include "passes/pipeline.h"
#include "sim/simulator.h"

namespace deepcompile::bindings {
namespace {

// The context of a pass written in Python. Holds the program that the pass
// edits, which outlives the call if Python keeps it.
struct PythonContext {
  ProgramPtr program;
  std::string pass;

  void because(const std::string& object, std::string text) const {
    if (!object.empty() && !program->find_param(object) && !program->find_region(object)) {
      throw UserError("[passes] " + pass + ": because(\"" + object +
                      "\"): no parameter or region of that name. Use \"\" for the whole step.");
    }
    program->reasons.push_back({pass, object, std::move(text)});
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

Contract contract_of(const py::object& callable) {
  const py::object contract = py::getattr(callable, "contract", py::none());
  if (contract.is_none()) return {};
  if (!py::isinstance<Contract>(contract)) {
    throw UserError("[passes] contract of " + std::string(py::repr(callable)) +
                    ": must be a deepcompile._core.PassContract.");
  }
  return contract.cast<Contract>();
}

// Python edits a copy, so that views it keeps stay good and an exception
// leaves the program as it was.
std::unique_ptr<Pass> python_pass(const py::object& callable) {
  const std::string name = py::cast<std::string>(
      py::getattr(callable, "__name__", py::none()).is_none() ? callable.get_type().attr("__name__")
                                                              : callable.attr("__name__"));
  auto run = [callable, name](StepProgram& program, PassContext&) {
    auto copy = std::make_shared<StepProgram>(program);
    callable(copy, PythonContext{copy, name});
    program = *copy;
  };
  return make_pass(name, contract_of(callable), std::move(run));
}

// What passes may ask of a machine; `costs` outlives it.
PassEnvironment environment_of(const MachineCosts* costs, std::optional<int64_t> memory_budget) {
  if (memory_budget && *memory_budget <= 0) {
    throw UserError("[passes] memory_budget: " + std::to_string(*memory_budget) +
                    " bytes. Give what one rank can allocate, above zero.");
  }
  PassEnvironment environment;
  if (memory_budget) environment.memory_budget = Bytes{*memory_budget};
  if (costs == nullptr) return environment;
  environment.estimator = costs;
  environment.simulate = [costs](const StepProgram& program) {
    const SimResult result = simulate(program, *costs);
    return SimSummary{result.time, result.peak};
  };
  return environment;
}

std::vector<PassRecord> run_passes(StepProgram& program, const std::vector<py::object>& list,
                                   const Machine* machine, std::optional<int64_t> memory_budget) {
  const PassRegistry registry = PassRegistry::with_builtins();
  std::vector<std::unique_ptr<Pass>> owned;
  std::vector<const Pass*> passes;
  for (const py::object& item : list) {
    if (py::isinstance<py::str>(item)) {
      passes.push_back(&registry.get(py::cast<std::string>(item)));
    } else if (PyCallable_Check(item.ptr())) {
      owned.push_back(python_pass(item));
      passes.push_back(owned.back().get());
    } else {
      throw UserError("[passes] " + std::string(py::repr(item)) +
                      ": is neither a pass's name nor a function of (program, context).");
    }
  }
  std::optional<MachineCosts> costs;
  if (machine != nullptr) costs.emplace(*machine);
  PipelineOptions options;
  options.environment = environment_of(costs ? &*costs : nullptr, memory_budget);
  options.clock = [] {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    return Nanos{std::chrono::duration_cast<std::chrono::nanoseconds>(now).count()};
  };
  return run_pipeline(program, passes, options);
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
           "Records why: `object` is a parameter's or region's name, or '' for the step.");

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

}  // namespace

void bind_passes(py::module_& m) {
  bind_classes(m);
  m.def("run_passes", &run_passes, py::arg("program"), py::arg("passes"),
        py::arg("machine") = nullptr, py::arg("memory_budget") = py::none(),
        "Runs passes in order and returns their log, a list of PassRecord. Each is a built-in's\n"
        "name or a function of (program, context). Contracts are checked before the first runs;\n"
        "the program is verified after each, and is as it was if anything raises.\n"
        "`machine` (a Machine) and `memory_budget` (bytes a rank) are for passes that ask what\n"
        "a choice costs: prefetch and selective_gather.");
  m.def(
      "pass_names", [] { return PassRegistry::with_builtins().names(); },
      "Names of the built-in passes.");
  m.def("pass_info", &pass_info, py::arg("name"), "Summary and contract of a built-in pass.");
}

}  // namespace deepcompile::bindings
