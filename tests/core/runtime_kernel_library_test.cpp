// SPDX-License-Identifier: Apache-2.0
// Loading libdeepcompile_cuda.so: there, absent, of another version, broken.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "runtime/cuda/library.h"
#include "test_support.h"

namespace deepcompile::runtime_kernel_library_test {
namespace {

std::string fake(const char* name) {
  return std::string(DEEPCOMPILE_FAKE_KERNELS) + "/" + name;
}

TEST(KernelLibrary, IsFoundInItsDirectory) {
  const auto library = KernelLibrary::open(fake("good"));
  ASSERT_NE(library, nullptr);
  EXPECT_EQ(library->path, fake("good") + "/libdeepcompile_cuda.so");
  EXPECT_EQ(library->adamw(0, nullptr, nullptr, 3, 0, 0, nullptr), 3);
  const KernelChoice choice = choose_kernels(library.get(), 0);
  EXPECT_EQ(choice.library, library.get());
  EXPECT_EQ(choice.why, library->path);
}

TEST(KernelLibrary, AbsentOrUnusableLeavesTorchsKernelsAndSaysWhy) {
  EXPECT_EQ(KernelLibrary::open(fake("nothing")), nullptr);
  EXPECT_EQ(KernelLibrary::beside_runtime(), nullptr);
  const KernelChoice none = choose_kernels(nullptr, 0);
  EXPECT_EQ(none.library, nullptr);
  EXPECT_NE(none.why.find("built without a CUDA toolkit"), std::string::npos) << none.why;
  const auto library = KernelLibrary::open(fake("good"));
  const KernelChoice other = choose_kernels(library.get(), 1);
  EXPECT_EQ(other.library, nullptr);
  EXPECT_NE(other.why.find("does not run on device 1: no code for it"), std::string::npos)
      << other.why;
}

TEST(KernelLibrary, OfAnotherVersionIsAnError) {
  const std::string old = error_of([] { KernelLibrary::open(fake("old")); });
  const std::string wanted = std::to_string(DEEPCOMPILE_CUDA_ABI);
  EXPECT_NE(old.find("has ABI 999, this runtime wants " + wanted), std::string::npos) << old;
  const std::string incomplete = error_of([] { KernelLibrary::open(fake("incomplete")); });
  EXPECT_NE(incomplete.find("has no function deepcompile_cuda_error"), std::string::npos)
      << incomplete;
}

TEST(KernelLibrary, ThatCannotBeLoadedIsAnError) {
  const std::filesystem::path broken = std::filesystem::path(testing::TempDir()) / "broken_kernels";
  std::filesystem::create_directories(broken);
  std::ofstream(broken / "libdeepcompile_cuda.so") << "not a library";
  const std::string message = error_of([&] { KernelLibrary::open(broken.string()); });
  EXPECT_NE(message.find("[runtime] the GPU kernels could not be loaded"), std::string::npos)
      << message;
  std::filesystem::remove_all(broken);
}

}  // namespace
}  // namespace deepcompile::runtime_kernel_library_test
