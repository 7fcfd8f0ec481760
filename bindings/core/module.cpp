// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "bind.h"

PYBIND11_MODULE(_core, m) {
  using namespace deepcompile;
  m.doc() =
      "The step program, its passes, plans and simulator. Needs neither torch nor a GPU.\n\n"
      "Sizes are bytes, times are integer nanoseconds, dtypes are 'f32', 'f16', 'bf16', 'f64'.";
  pybind11::register_exception<UserError>(m, "UserError", PyExc_ValueError);
  pybind11::register_exception<InternalError>(m, "InternalError", PyExc_RuntimeError);
  m.attr("UserError").attr("__doc__") =
      "Something the user can correct. The text names stage, object, cause and remedy.";
  m.attr("InternalError").attr("__doc__") = "A bug of ours: please report it with the text.";
  bindings::bind_ir(m);
  bindings::bind_passes(m);
  bindings::bind_pass_library(m);
  bindings::bind_plan(m);
  bindings::bind_cost(m);
  bindings::bind_sim(m);
  bindings::bind_report(m);
}
