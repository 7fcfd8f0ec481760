// SPDX-License-Identifier: Apache-2.0
#include "runtime/cuda/library.h"

#include <dlfcn.h>
#include <unistd.h>

#include "base/error.h"

namespace deepcompile {
namespace {

constexpr const char* kName = "libdeepcompile_cuda.so";

template <typename Function>
void find(void* handle, const std::string& path, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(handle, name));
  if (*function) return;
  throw UserError("[runtime] " + path + " has no function " + name +
                  ", so it is not this version's. Build and install deepcompile again.");
}

}  // namespace

KernelLibrary::KernelLibrary(const std::string& path) : path(path) {
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) {
    throw UserError("[runtime] the GPU kernels could not be loaded: " + std::string(dlerror()) +
                    ". Build and install deepcompile again, or remove the file to use torch's "
                    "kernels.");
  }
  decltype(&deepcompile_cuda_abi) abi = nullptr;
  find(handle, path, "deepcompile_cuda_abi", &abi);
  if (abi() != DEEPCOMPILE_CUDA_ABI) {
    throw UserError("[runtime] " + path + " has ABI " + std::to_string(abi()) +
                    ", this runtime wants " + std::to_string(DEEPCOMPILE_CUDA_ABI) +
                    ". Build and install deepcompile again.");
  }
  find(handle, path, "deepcompile_cuda_error", &error);
  find(handle, path, "deepcompile_cuda_usable", &usable);
  find(handle, path, "deepcompile_cuda_adamw", &adamw);
  find(handle, path, "deepcompile_cuda_squared_sum_partials", &squared_sum_partials);
  find(handle, path, "deepcompile_cuda_squared_sum", &squared_sum);
  find(handle, path, "deepcompile_cuda_piece_sums", &piece_sums);
  find(handle, path, "deepcompile_cuda_piece_totals", &piece_totals);
}

std::unique_ptr<KernelLibrary> KernelLibrary::open(const std::string& directory) {
  const std::string path = directory + "/" + kName;
  if (access(path.c_str(), F_OK) != 0) return nullptr;
  return std::unique_ptr<KernelLibrary>(new KernelLibrary(path));
}

std::string KernelLibrary::directory_of_runtime() {
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&KernelLibrary::open), &info) == 0 || !info.dli_fname) {
    throw UserError(
        "[runtime] the runtime's own file was not found, so neither were its GPU "
        "kernels. Install deepcompile as files.");
  }
  const std::string file = info.dli_fname;
  const size_t slash = file.rfind('/');
  return slash == std::string::npos ? "." : file.substr(0, slash);
}

const KernelLibrary* KernelLibrary::beside_runtime() {
  static const std::unique_ptr<KernelLibrary> library = open(directory_of_runtime());
  return library.get();
}

KernelChoice choose_kernels(const KernelLibrary* library, int index) {
  if (!library) {
    return {nullptr, "deepcompile was built without a CUDA toolkit (no " + std::string(kName) +
                         " in " + KernelLibrary::directory_of_runtime() + ")"};
  }
  const int status = library->usable(index);
  if (status == 0) return {library, library->path};
  return {nullptr, library->path + " does not run on device " + std::to_string(index) + ": " +
                       library->error(status)};
}

}  // namespace deepcompile
