// SPDX-License-Identifier: Apache-2.0
// Python module deepcompile._runtime: conversions and docstrings, no decisions.
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "base/error.h"
#include "pinned_pools.h"
#include "python_recorder.h"
#include "python_region.h"
#include "runtime/runtime.h"
#include "values.h"

namespace deepcompile {
namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;
using MemberTuple = std::tuple<std::string, at::Tensor, int64_t>;

CopyEngineOptions copy_engine_options(const std::string& gather, const std::string& reduce,
                                      const py::dict& more) {
  CopyEngineOptions options;
  options.gather = gather;
  options.reduce = reduce;
  for (const auto& [key, value] : more) {
    const auto name = key.cast<std::string>();
    if (name == "library") {
      options.library = value.cast<std::string>();
    } else if (name == "host") {
      options.host = value.cast<std::string>();
    } else if (name == "least_bytes") {
      options.least_bytes = value.cast<int64_t>();
    } else if (name == "in_step_bytes") {
      options.in_step_bytes = value.cast<int64_t>();
    } else if (name == "signals") {
      options.signals = value.cast<std::string>();
    } else {
      throw UserError("[runtime] copy_engine_options has no \"" + name +
                      "\". Use library, host, least_bytes, in_step_bytes or signals.");
    }
  }
  return options;
}

py::dict route_dict(const Route& route) {
  py::dict found;
  found["transport"] = route.transport;
  found["why"] = route.why;
  return found;
}

template <typename Call>
auto without_gil(Call&& call) {
  const py::gil_scoped_release no_gil;
  return call();
}

// A runtime may hold the last reference to its process group, whose end waits for threads that
// may need the GIL to give a tensor back.
struct DeleteWithoutGil {
  void operator()(Runtime* runtime) const {
    const py::gil_scoped_release no_gil;
    delete runtime;
  }
};
using RuntimeHolder = std::unique_ptr<Runtime, DeleteWithoutGil>;
using RuntimeClass = py::class_<Runtime, RuntimeHolder>;

RuntimeHolder make_runtime(const py::object& group, int64_t rank, int64_t world,
                           const at::Device& device, const std::string& reduce_dtype, double clip,
                           int64_t accumulation, double timeout_s, const std::string& gather,
                           const std::string& reduce, const py::dict& more,
                           const py::object& recorder, const std::string& no_recorder) {
  DType dtype;
  if (!parse_dtype(reduce_dtype, &dtype)) {
    throw UserError("[runtime] reduce_dtype is \"" + reduce_dtype +
                    "\". Use f32, bf16, f16 or f64.");
  }
  RuntimeOptions options{
      .group_name = group.is_none() ? "" : group.attr("group_name").cast<std::string>(),
      .rank = rank,
      .world = world,
      .device = device,
      .reduce_dtype = scalar_type(dtype),
      .clip = clip,
      .accumulation = accumulation,
      .timeout_s = timeout_s,
      .copy_engine = copy_engine_options(gather, reduce, more),
      .recorder = make_python_recorder(recorder.ptr(), device),
      .no_recorder = no_recorder};
  const py::gil_scoped_release no_gil;
  return RuntimeHolder(new Runtime(options));
}

Placement placement_from(const std::string& word) {
  if (word == "sharded") return Placement::kSharded;
  if (word == "whole") return Placement::kWhole;
  if (word == "replicated") return Placement::kReplicated;
  throw UserError("[runtime] placement is \"" + word + "\". Use sharded, whole or replicated.");
}

void add_param(Runtime& runtime, const std::string& name, const std::vector<MemberTuple>& members,
               int64_t numel, const std::string& placement, bool trainable) {
  ParamSpec spec{.name = name,
                 .members = {},
                 .numel = numel,
                 .placement = placement_from(placement),
                 .trainable = trainable};
  for (const auto& [member, tensor, offset] : members) {
    spec.members.push_back({.name = member, .parameter = tensor, .offset = offset});
  }
  runtime.add_param(spec);
}

void reduce(Runtime& runtime, const std::string& name, const py::dict& grads) {
  std::vector<std::pair<std::string, at::Tensor>> pairs;
  for (const auto& [member, grad] : grads) {
    if (!grad.is_none()) pairs.emplace_back(member.cast<std::string>(), grad.cast<at::Tensor>());
  }
  const py::gil_scoped_release no_gil;
  runtime.reduce(name, pairs);
}

int64_t load_plan(Runtime& runtime, const std::string& text, const py::list& codes) {
  std::vector<std::shared_ptr<RegionCode>> regions;
  for (const py::handle code : codes) {
    regions.push_back(code.is_none() ? nullptr : std::make_shared<PythonRegion>(code.ptr()));
  }
  const py::gil_scoped_release no_gil;
  return runtime.load_plan(text, std::move(regions));
}

py::object run(Runtime& runtime, int64_t plan, int64_t section, int64_t call, py::list inputs) {
  std::vector<RuntimeValue> values = list_from_python(inputs.ptr(), "an input of a section");
  if (PyList_SetSlice(inputs.ptr(), 0, PyList_GET_SIZE(inputs.ptr()), nullptr) != 0) {
    throw py::error_already_set();
  }
  const auto outputs =
      without_gil([&] { return runtime.run(plan, section, call, std::move(values)); });
  return py::reinterpret_steal<py::object>(list_to_python(outputs));
}

py::object tensor_or_none(const at::Tensor& tensor) {
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor));
}

py::dict step(Runtime& runtime, int64_t plan, double loss_scale_inv,
              std::optional<bool> check_finite) {
  const StepOptions options{.loss_scale_inv = loss_scale_inv,
                            .check_finite = check_finite.value_or(loss_scale_inv != 1.0)};
  const auto result = without_gil([&] { return runtime.step(plan, options); });
  py::dict report;
  report["grad_norm"] =
      result.norm ? py::object(py::float_(*result.norm)) : tensor_or_none(result.norm_tensor);
  report["skipped"] = result.skipped;
  return report;
}

py::list pieces(Runtime& runtime) {
  const auto found = without_gil([&] { return runtime.pieces(); });
  py::list list;
  for (const Piece& piece : found) {
    py::dict item;
    item["param_name"] = piece.param;
    item["member"] = piece.member;
    item["start"] = piece.start;
    item["stop"] = piece.stop;
    item["weight"] = tensor_or_none(piece.weight);
    item["master"] = tensor_or_none(piece.master);
    item["exp_avg"] = tensor_or_none(piece.exp_avg);
    item["exp_avg_sq"] = tensor_or_none(piece.exp_avg_sq);
    item["step"] = piece.step;
    list.append(std::move(item));
  }
  return list;
}

py::list records(Runtime& runtime) {
  const auto found = without_gil([&] { return runtime.records(); });
  py::list list;
  for (const TraceRecord& record : found) {
    list.append(py::make_tuple(record.id.plan, record.id.section, record.id.instr, record.start_ns,
                               record.stop_ns, record.workspace_bytes));
  }
  return list;
}

py::dict relieved(Runtime& runtime) {
  const auto found = without_gil([&] { return runtime.relieved(); });
  py::dict report;
  report["times"] = found.times;
  report["states_bytes"] = found.states_bytes;
  report["values_bytes"] = found.values_bytes;
  report["params_bytes"] = found.params_bytes;
  return report;
}

py::dict replays(Runtime& runtime) {
  const auto found = without_gil([&] { return runtime.replays(); });
  py::dict report;
  report["on"] = found.on;
  report["recordings"] = found.recordings;
  report["runs"] = found.runs;
  report["bytes"] = found.bytes;
  report["peak_bytes"] = found.peak_bytes;
  report["replayed"] = found.replayed;
  report["missed"] = found.missed;
  report["moved"] = found.moved;
  report["why_not"] = found.why_not;
  report["refused"] = found.refused;
  return report;
}

py::dict kernels(Runtime& runtime) {
  const auto found = without_gil([&] { return runtime.kernels(); });
  py::dict report;
  report["adamw"] = found.adamw;
  report["norm"] = found.norm;
  report["library"] = found.library;
  return report;
}

// deepcompile._core owns the Python classes; this module throws the same ones.
void register_errors(py::module_& module) {
  const py::module_ core = py::module_::import("deepcompile._core");
  static PyObject* user_error = core.attr("UserError").cast<py::object>().release().ptr();
  static PyObject* internal_error = core.attr("InternalError").cast<py::object>().release().ptr();
  static PyObject* out_of_memory =
      PyErr_NewException("deepcompile._runtime.OutOfMemoryError", user_error, nullptr);
  module.attr("OutOfMemoryError") = py::reinterpret_borrow<py::object>(out_of_memory);
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const OutOfMemory& memory) {
      PyErr_SetString(out_of_memory, memory.what());
    } catch (const UserError& user) {
      PyErr_SetString(user_error, user.what());
    } catch (const InternalError& internal) {
      PyErr_SetString(internal_error, internal.what());
    }
  });
}

void bind_params(RuntimeClass& runtime) {
  runtime
      .def("add_param", &add_param, py::arg("name"), py::arg("members"), py::arg("numel"),
           py::arg("placement"), py::arg("trainable"),
           "Take over the member tensors [(name, tensor, offset in elements)] of one parameter.\n\n"
           "Their values must be equal on all ranks. Each tensor keeps its identity and shape;\n"
           "a sharded one has no memory until it is gathered.")
      .def(
          "set_hyper",
          [](Runtime& self, const std::string& member, double lr, double beta1, double beta2,
             double eps, double weight_decay, bool decoupled) {
            const py::gil_scoped_release no_gil;
            self.set_hyper(member, {lr, beta1, beta2, eps, weight_decay, decoupled});
          },
          py::arg("member_name"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
          py::arg("weight_decay"), py::arg("decoupled"),
          "Optimizer settings of one member, until set again. decoupled: AdamW, else Adam.")
      .def(
          "exchange_rows_over",
          [](Runtime& self, const py::object& group) {
            const std::string name = group.attr("group_name").cast<std::string>();
            const py::gil_scoped_release no_gil;
            self.exchange_rows_over(name);
          },
          py::arg("process_group"),
          "Before a plan that exchanges rows: the group, with a backend for CPU tensors, over\n"
          "which ranks tell each other how many rows they read.")
      .def("gather", &Runtime::gather, NoGil(), py::arg("names"),
           "Start making parameters whole. Collective.")
      .def("wait", &Runtime::wait, NoGil(), py::arg("names"),
           "Make gathered parameters usable by the current stream.")
      .def("release", &Runtime::release, NoGil(), py::arg("names"),
           "Give the memory of gathered sharded parameters back.")
      .def("is_whole", &Runtime::is_whole, NoGil(), py::arg("name"))
      .def("is_written", &Runtime::is_written, NoGil(), py::arg("member"),
           "Whether someone changed it in place since its last update and store.")
      .def("store", &Runtime::store, NoGil(), py::arg("names"),
           "Keep what was written into whole parameters, equally on all ranks.")
      .def("reduce", &reduce, py::arg("name"), py::arg("grads"),
           "Start the mean over ranks of {member: gradient or None}. Collective. The tensors\n"
           "are the runtime's until the optimizer step: do not write to them.")
      .def("accumulate", &Runtime::accumulate, NoGil(), py::arg("name"),
           "Wait for the reduction and add it to the gradient.")
      .def("gradient", &Runtime::gradient, NoGil(), py::arg("name"),
           "Mean gradient over this rank's part of the flat parameter (1-D f32 copy), or None.")
      .def("broadcast", &Runtime::broadcast, NoGil(), py::arg("tensor"),
           "Overwrite the tensor with rank 0's. Collective.")
      .def("barrier", &Runtime::barrier, NoGil());
}

void bind_steps(RuntimeClass& runtime) {
  runtime
      .def("load_plan", &load_plan, py::arg("plan_json"), py::arg("codes"),
           "Check a frozen plan against this job and keep it; returns its id. codes[i] is the\n"
           "boxed callable of code i: f(list) -> sequence of outputs, emptying the list.")
      .def("unload_plan", &Runtime::unload_plan, NoGil(), py::arg("plan_id"),
           "Forget a plan, now or when its last open call is over.")
      .def("new_call", &Runtime::new_call, NoGil(), py::arg("plan_id"),
           "(call id, token). The call's saved values go with its backward or with the token.")
      .def("run", &run, py::arg("plan_id"), py::arg("section_index"), py::arg("call_id"),
           py::arg("inputs"),
           "Run a section; returns its outputs. Empties `inputs`. call_id -1 keeps nothing for\n"
           "a backward.")
      .def("step", &step, py::arg("plan_id"), py::arg("loss_scale_inv") = 1.0,
           py::arg("check_finite") = py::none(),
           "Run the plan's update section and drop the gradients. Returns {grad_norm, skipped}:\n"
           "the norm of the mean gradient before clipping (float on a CPU, 0-dim tensor on a\n"
           "device, None without clipping), and whether a gradient that is not finite made all\n"
           "ranks skip. That is checked if check_finite, by default if loss_scale_inv != 1.")
      .def("zero_grad", &Runtime::zero_grad, NoGil())
      .def("abandon_step", &Runtime::abandon_step, NoGil(),
           "Drop the step's gradients, and that some parameters had their update early: for\n"
           "whoever overwrites weights and states next.")
      .def("set_last_micro_batch", &Runtime::set_last_micro_batch, NoGil(), py::arg("last"),
           "Before each micro-batch's forward: whether its backward completes the gradients of\n"
           "the step. True until set.")
      .def("settle", &Runtime::settle, NoGil(),
           "Apply deferred updates and make whole parameters whole again. Collective.")
      .def("pieces", &pieces,
           "This rank's part of each member: dicts of member, param_name, start, stop (elements\n"
           "of the flattened member), weight, master, exp_avg, exp_avg_sq (1-D views; None but\n"
           "weight if frozen) and step. Master and states are on the host where a plan left\n"
           "them there. Applies deferred updates first.")
      .def("masters_changed", &Runtime::masters_changed, NoGil(),
           "Set the weights from the masters, on every rank, after writing into pieces().")
      .def("optimizer_steps", &Runtime::optimizer_steps, NoGil())
      .def("set_step", &Runtime::set_step, NoGil(), py::arg("n"),
           "Set the number of updates done, by the optimizer and to every member.")
      .def("set_member_step", &Runtime::set_member_step, NoGil(), py::arg("member_name"),
           py::arg("n"), "Set the number of updates done to one member.")
      .def("trace", &Runtime::trace, NoGil(), py::arg("on"))
      .def("records", &records,
           "[(plan id, section, instruction, start ns, end ns, workspace bytes)] since\n"
           "trace(True). Transfers: their time on the link. Workspace: of runs, -1 if unknown.");
}

py::dict measure_links(Runtime& runtime, const std::vector<int64_t>& bytes, int64_t repeats) {
  const auto measures = without_gil([&] { return runtime.measure_links(bytes, repeats); });
  py::dict found = py::cast(measures.times);
  if (measures.beside) {
    found["to_host_beside"] = measures.beside->to_host;
    found["to_device_beside"] = measures.beside->to_device;
  }
  return found;
}

void bind_resources(RuntimeClass& runtime) {
  runtime
      .def("buffer_report", &Runtime::buffer_report, NoGil(),
           "Bytes held on this rank, by kind. host_states, host_values: on the host; host_pool:\n"
           "host memory kept for the next values.")
      .def("share", &Runtime::share, NoGil(), py::arg("flag"),
           "Start the maximum of an integer over ranks. Collective; waits for nobody.")
      .def("shared", &Runtime::shared, NoGil(), "Result of the last share but one; 0 before.")
      .def("measure_links", &measure_links, py::arg("bytes"), py::arg("repeats") = 5,
           "{gather, reduce, to_host, to_device: [(bytes, ns)]}: medians of the slowest rank, the\n"
           "same on all ranks. On a device to_host_beside and to_device_beside too: the fraction\n"
           "of its speed that a direction keeps while the other one is busy. Collective.")
      .def_property_readonly(
          "gathers", [](const Runtime& self) { return route_dict(self.gathers()); },
          "{transport: what gathers go over, nccl or copy_engine; why}.")
      .def_property_readonly(
          "reductions", [](const Runtime& self) { return route_dict(self.reductions()); },
          "{transport: what reductions go over, nccl or copy_engine; why}.")
      .def("outside_bytes", &Runtime::outside_bytes, NoGil(),
           "Bytes of device memory in use that torch's allocator does not count.")
      .def("kernels", &kernels,
           "{adamw, norm: whose kernels compute them, deepcompile_cuda, torch or cpu; library:\n"
           "deepcompile_cuda's path, or why it is not used}.")
      .def(
          "replays", &replays,
          "{on: steps that repeat are recorded; recordings: of them so far; runs, bytes: of the\n"
          "recording in use, bytes without what tensors hold, which the allocator counts as free;\n"
          "peak_bytes: most that tensors held while it was recorded, as in any step since;\n"
          "replayed: runs launched from recordings; missed: recorded runs that had to run as "
          "ever;\n"
          "moved: what the first of these read elsewhere, when a step last missed one; why_not:\n"
          "there is no recording; refused: the last run that could not be recorded, and why}.")
      .def("relieved", &relieved,
           "{times, states_bytes, values_bytes, params_bytes} moved to the host because an "
           "instruction found no\n"
           "memory, since the last call.")
      .def("limit_bytes", &Runtime::limit_bytes, NoGil(), py::arg("bytes"),
           "Behave as if the device had so many bytes for what the runtime holds; 0: as it is.")
      .def(
          "peak_bytes", &Runtime::peak_bytes, NoGil(),
          "Most bytes of tensors on the device since reset_peak_bytes. On a CPU: inside sections,\n"
          "from the first reset on.")
      .def("reset_peak_bytes", &Runtime::reset_peak_bytes, NoGil());
}

}  // namespace
}  // namespace deepcompile

PYBIND11_MODULE(_runtime, m) {
  using namespace deepcompile;
  m.doc() = "Sharded training runtime: parameters, transports, optimizer and plan executor.";
  py::module_::import("torch");
  register_errors(m);
  RuntimeClass runtime(m, "Runtime");
  runtime.def(
      py::init(&make_runtime), py::arg("process_group"), py::arg("rank"), py::arg("world"),
      py::arg("device"), py::arg("reduce_dtype") = "f32", py::arg("clip") = 0.0,
      py::arg("accumulation") = 1, py::arg("timeout_s") = 600.0, py::arg("gather") = "nccl",
      py::arg("reduce") = "nccl", py::arg("copy_engine_options") = py::dict(),
      py::arg("recorder") = py::none(), py::arg("no_recorder") = "there is no recorder",
      "One engine's runtime on one rank. process_group may be None for one rank. gather,\n"
      "reduce: what they go over, nccl (the process group), copy_engine or auto; not nccl:\n"
      "making the runtime is collective. copy_engine_options, for tests and benchmarks: library\n"
      "(a file in libcuda's place), host (a name in this host's place), least_bytes (of a shard\n"
      "or piece that is copied), in_step_bytes (of one that keeps ranks in step), signals\n"
      "(writes, copies or auto). recorder: see bindings/runtime/python_recorder.h; None: regions\n"
      "always run through their own code, and no_recorder is what replays() says of it.");
  bind_params(runtime);
  bind_steps(runtime);
  bind_resources(runtime);
  bind_pinned_pools(m);
}
