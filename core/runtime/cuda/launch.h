// SPDX-License-Identifier: Apache-2.0
// From torch's types to arguments of the kernel library.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include "runtime/cuda/library.h"

namespace deepcompile {

// The deepcompile_cuda_type of f32, f64, f16 or bf16.
int cuda_type(c10::ScalarType dtype);
// The caller's current stream on the device, as the CUDA runtime has it.
void* current_cuda_stream(c10::Device device);
// Throws UserError if a launch was refused; `what`: the kernel's name.
void check_launch(const KernelLibrary& library, int status, const char* what);

}  // namespace deepcompile
