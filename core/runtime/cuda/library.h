// SPDX-License-Identifier: Apache-2.0
// The kernels of libdeepcompile_cuda.so, which is built where there is a CUDA
// toolkit and installed beside the runtime. Needs neither torch nor CUDA itself.
//
// Thread-safe: loaded once for the process, never unloaded.
#pragma once

#include <memory>
#include <string>

#include "runtime/cuda/kernels.h"

namespace deepcompile {

class KernelLibrary {
 public:
  // Opens directory/libdeepcompile_cuda.so; null if there is no such file.
  // Throws UserError if there is one that cannot be loaded or has another ABI.
  static std::unique_ptr<KernelLibrary> open(const std::string& directory);
  // The one beside this program part's own file, opened when first asked for.
  static const KernelLibrary* beside_runtime();
  // Where beside_runtime looks.
  static std::string directory_of_runtime();

  const std::string path;
  decltype(&deepcompile_cuda_error) error = nullptr;
  decltype(&deepcompile_cuda_usable) usable = nullptr;
  decltype(&deepcompile_cuda_adamw) adamw = nullptr;
  decltype(&deepcompile_cuda_squared_sum_partials) squared_sum_partials = nullptr;
  decltype(&deepcompile_cuda_squared_sum) squared_sum = nullptr;
  decltype(&deepcompile_cuda_piece_sums) piece_sums = nullptr;
  decltype(&deepcompile_cuda_piece_totals) piece_totals = nullptr;

 private:
  explicit KernelLibrary(const std::string& path);
};

// Which kernels serve a device.
struct KernelChoice {
  const KernelLibrary* library = nullptr;  // null: torch's kernels
  std::string why;                         // the library's path, or why there is none
};

// For CUDA device `index`. Throws as KernelLibrary::open.
KernelChoice choose_kernels(const KernelLibrary* library, int index);

}  // namespace deepcompile
