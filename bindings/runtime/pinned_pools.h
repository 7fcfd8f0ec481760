// SPDX-License-Identifier: Apache-2.0
// Pinned host memory of a pool that CUDA graphs allocate from. A graph counts itself
// among the pool's users while its capture begins, and torch ends neither that nor
// the capture itself where the capture turns out to be invalid: every later capture
// from the pool would be refused.
//
// For deepcompile/cuda_graphs.py.
#pragma once

#include <pybind11/pybind11.h>

namespace deepcompile {

// hold_pinned_pool(pool), release_pinned_pool(pool): counts one user more, or less.
// end_pinned_pool(pool): what an invalid capture left is over. Throws if none did.
// A pool is the pair of numbers that torch.cuda.graph_pool_handle() gives.
void bind_pinned_pools(pybind11::module_& m);

}  // namespace deepcompile
