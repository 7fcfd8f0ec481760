// SPDX-License-Identifier: Apache-2.0
// What driver.cpp takes from CUDA's cuda.h: functions, two structures and some
// values. tests/fake_cuda/declarations.cpp compares them with the real header.
#pragma once

#include <cstddef>
#include <cstdint>

namespace deepcompile::cuda_driver {

using Address = unsigned long long;  // CUdeviceptr
using Stream = void*;                // CUstream

// CUipcMemHandle: what lets another process open an allocation.
struct IpcHandle {
  char bytes[64] = {};
};

constexpr int kSuccess = 0;
constexpr int kNotReady = 600;           // CUDA_ERROR_NOT_READY
constexpr unsigned kLazyPeerAccess = 1;  // CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
constexpr unsigned kNonBlocking = 1;     // CU_STREAM_NON_BLOCKING
constexpr unsigned kGreaterOrEqual = 0;  // CU_STREAM_WAIT_VALUE_GEQ
constexpr unsigned kWithBarrier = 0;     // CU_STREAM_WRITE_VALUE_DEFAULT: earlier writes first
constexpr int kWaitValue = 1;            // CU_STREAM_MEM_OP_WAIT_VALUE_32
constexpr int kWriteValue = 2;           // CU_STREAM_MEM_OP_WRITE_VALUE_32
constexpr int kRelaxed = 2;              // CU_STREAM_CAPTURE_MODE_RELAXED

// CUstreamBatchMemOpParams of a write or a wait: a union of 48 bytes.
struct BatchOp {
  int operation;
  Address address;
  uint64_t value;  // the 32-bit word is its first half
  unsigned flags;
  Address alias;
  uint64_t rest;
};
static_assert(sizeof(BatchOp) == 48);

// Names are those of libcuda's symbols, enums are int and handles void*.
struct Functions {
  int (*init)(unsigned) = nullptr;
  int (*version)(int*) = nullptr;
  int (*error_name)(int, const char**) = nullptr;
  int (*device_get)(int*, int) = nullptr;
  int (*device_bus_id)(char*, int, int) = nullptr;
  int (*device_by_bus_id)(int*, const char*) = nullptr;
  int (*can_access)(int*, int, int) = nullptr;
  int (*retain)(void**, int) = nullptr;
  int (*release)(int) = nullptr;
  int (*push)(void*) = nullptr;
  int (*pop)(void**) = nullptr;
  int (*current)(void**) = nullptr;
  int (*allocate)(Address*, size_t) = nullptr;
  int (*free)(Address) = nullptr;
  int (*ipc_get)(IpcHandle*, Address) = nullptr;
  int (*ipc_open)(Address*, IpcHandle, unsigned) = nullptr;
  int (*ipc_close)(Address) = nullptr;
  int (*copy)(Address, Address, size_t, Stream) = nullptr;
  int (*copy_to_host)(void*, Address, size_t, Stream) = nullptr;
  int (*copy_to_device)(Address, const void*, size_t, Stream) = nullptr;
  int (*batch_ops)(Stream, unsigned, BatchOp*, unsigned) = nullptr;
  int (*stream_create)(Stream*, unsigned) = nullptr;
  int (*stream_destroy)(Stream) = nullptr;
  int (*stream_query)(Stream) = nullptr;
  int (*stream_synchronize)(Stream) = nullptr;
  int (*capture_mode)(int*) = nullptr;
};

}  // namespace deepcompile::cuda_driver
