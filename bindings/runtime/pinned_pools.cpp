// SPDX-License-Identifier: Apache-2.0
#include "pinned_pools.h"

#include <ATen/core/CachingHostAllocator.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <utility>

namespace deepcompile {
namespace {

using Pool = std::pair<uint64_t, uint64_t>;

at::HostAllocator* allocator() {
  return at::getHostAllocator(at::kCUDA);
}

void hold(const Pool& pool) {
  allocator()->begin_allocate_to_pool(pool, [](const c10::Stream&) { return false; });
  allocator()->end_allocate_to_pool(pool);
}

}  // namespace

void bind_pinned_pools(pybind11::module_& m) {
  m.def("hold_pinned_pool", &hold, pybind11::arg("pool"));
  m.def(
      "release_pinned_pool", [](const Pool& pool) { allocator()->release_pool(pool); },
      pybind11::arg("pool"));
  m.def(
      "end_pinned_pool", [](const Pool& pool) { allocator()->end_allocate_to_pool(pool); },
      pybind11::arg("pool"));
}

}  // namespace deepcompile
