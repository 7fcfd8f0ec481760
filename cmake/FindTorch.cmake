# SPDX-License-Identifier: Apache-2.0
# The torch that the building Python imports, as interface target deepcompile_torch.
#
# find_package(Torch) also wants a CUDA toolkit wherever torch was built with
# one. The runtime uses torch's device-generic interfaces only, so headers and
# the CPU libraries are all it needs, on machines with and without CUDA.
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
          "import torch, os; print(os.path.dirname(torch.__file__)); print(torch.__version__); print(int(torch._C._GLIBCXX_USE_CXX11_ABI))"
  OUTPUT_VARIABLE torch_report OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE found)
if(NOT found EQUAL 0)
  message(FATAL_ERROR "torch is missing in ${Python_EXECUTABLE}: pip install 'torch>=2.11'")
endif()
string(REPLACE "\n" ";" torch_report "${torch_report}")
list(GET torch_report 0 torch_root)
list(GET torch_report 1 torch_version)
list(GET torch_report 2 torch_abi)
message(STATUS "torch ${torch_version} in ${torch_root}")

add_library(deepcompile_torch INTERFACE)
target_include_directories(deepcompile_torch SYSTEM INTERFACE
  "${torch_root}/include" "${torch_root}/include/torch/csrc/api/include")
target_compile_definitions(deepcompile_torch INTERFACE
  _GLIBCXX_USE_CXX11_ABI=${torch_abi} USE_C10D_GLOO)
target_link_directories(deepcompile_torch INTERFACE "${torch_root}/lib")
target_link_libraries(deepcompile_torch INTERFACE c10 torch_cpu torch torch_python)
