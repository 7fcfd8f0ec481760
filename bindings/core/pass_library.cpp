// SPDX-License-Identifier: Apache-2.0
#include "pass_library.h"

#include "bind.h"
#include "passes/library.h"

namespace deepcompile::bindings {

void bind_pass_library(py::module_& m) {
  py::class_<LoadedPass>(m, "LoadedPass", "A pass of a user's shared library, for run_passes.")
      .def_property_readonly("name",
                             [](const LoadedPass& p) { return std::string(p.pass->name()); })
      .def_property_readonly("summary",
                             [](const LoadedPass& p) { return std::string(p.pass->summary()); })
      .def_property_readonly("contract", [](const LoadedPass& p) { return p.pass->contract(); })
      .def_readonly("library", &LoadedPass::library, "The path it was loaded from.")
      .def("__repr__", [](const LoadedPass& p) {
        return "<LoadedPass " + std::string(p.pass->name()) + " of " + p.library + ">";
      });
  m.def(
      "load_pass_library",
      [](const std::string& path) {
        std::vector<LoadedPass> passes;
        for (auto& pass : load_pass_library(path)) passes.push_back({std::move(pass), path});
        return passes;
      },
      py::arg("path"),
      "The passes of a shared library, which stays loaded. Raises UserError if it has none or\n"
      "was built for another ABI.");
}

}  // namespace deepcompile::bindings
