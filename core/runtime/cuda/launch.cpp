// SPDX-License-Identifier: Apache-2.0
#include "runtime/cuda/launch.h"

#include <c10/core/impl/VirtualGuardImpl.h>

#include <string>

#include "base/error.h"

namespace deepcompile {

int cuda_type(c10::ScalarType dtype) {
  switch (dtype) {
    case c10::kFloat:
      return DEEPCOMPILE_CUDA_F32;
    case c10::kBFloat16:
      return DEEPCOMPILE_CUDA_BF16;
    case c10::kHalf:
      return DEEPCOMPILE_CUDA_F16;
    case c10::kDouble:
      return DEEPCOMPILE_CUDA_F64;
    default:
      break;
  }
  DC_CHECK(false, "gradients and weights are f32, f64, f16 or bf16");
}

void* current_cuda_stream(c10::Device device) {
  const c10::impl::VirtualGuardImpl guard(device.type());
  return guard.getStreamNativeHandle(guard.getStream(device));
}

void check_launch(const KernelLibrary& library, int status, const char* what) {
  if (status == 0) return;
  throw UserError("[runtime] the " + std::string(what) + " kernel of " + library.path +
                  " did not start: " + library.error(status) +
                  ". An error of the device is often one of earlier work: run with "
                  "CUDA_LAUNCH_BLOCKING=1 to find it.");
}

}  // namespace deepcompile
