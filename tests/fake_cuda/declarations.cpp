// SPDX-License-Identifier: Apache-2.0
// Compiles only if the runtime's declarations of the CUDA driver are cuda.h's.
#include <cuda.h>

#include <cstddef>
#include <type_traits>

#include "runtime/comm/driver_functions.h"

namespace {

namespace ours = deepcompile::cuda_driver;

// A type of cuda.h as the runtime writes it.
template <typename T>
struct Plain {
  using type = std::conditional_t<std::is_enum_v<T>, int, T>;
};
// clang-format off
template <> struct Plain<CUcontext> { using type = void*; };
template <> struct Plain<CUcontext*> { using type = void**; };
template <> struct Plain<CUstream> { using type = void*; };
template <> struct Plain<CUstream*> { using type = void**; };
template <> struct Plain<CUstreamCaptureMode*> { using type = int*; };
template <> struct Plain<CUipcMemHandle> { using type = ours::IpcHandle; };
template <> struct Plain<CUipcMemHandle*> { using type = ours::IpcHandle*; };
template <> struct Plain<CUstreamBatchMemOpParams*> { using type = ours::BatchOp*; };
// clang-format on

template <typename F>
struct Signature;
template <typename R, typename... A>
struct Signature<R (*)(A...)> {
  using type = typename Plain<R>::type (*)(typename Plain<A>::type...);
};

template <typename Theirs, typename Ours>
constexpr bool same = std::is_same_v<typename Signature<Theirs>::type, Ours>;

#define CHECK(theirs, member) \
  static_assert(same<decltype(&theirs), decltype(ours::Functions::member)>, #theirs)

CHECK(cuInit, init);
CHECK(cuGetErrorName, error_name);
CHECK(cuDeviceGet, device_get);
CHECK(cuDeviceGetPCIBusId, device_bus_id);
CHECK(cuDeviceGetByPCIBusId, device_by_bus_id);
CHECK(cuDeviceCanAccessPeer, can_access);
CHECK(cuDevicePrimaryCtxRetain, retain);
CHECK(cuDevicePrimaryCtxRelease, release);
CHECK(cuCtxPushCurrent, push);
CHECK(cuCtxPopCurrent, pop);
CHECK(cuCtxGetCurrent, current);
CHECK(cuMemAlloc, allocate);
CHECK(cuMemFree, free);
CHECK(cuIpcGetMemHandle, ipc_get);
CHECK(cuIpcOpenMemHandle, ipc_open);
CHECK(cuIpcCloseMemHandle, ipc_close);
CHECK(cuMemcpyDtoDAsync, copy);
CHECK(cuMemcpyDtoHAsync, copy_to_host);
CHECK(cuMemcpyHtoDAsync, copy_to_device);
CHECK(cuDriverGetVersion, version);
#if CUDA_VERSION >= 13000
#endif
CHECK(cuStreamBatchMemOp, batch_ops);
CHECK(cuStreamCreate, stream_create);
CHECK(cuStreamDestroy, stream_destroy);
CHECK(cuStreamQuery, stream_query);
CHECK(cuStreamSynchronize, stream_synchronize);
CHECK(cuThreadExchangeStreamCaptureMode, capture_mode);

using Op = CUstreamBatchMemOpParams;
static_assert(sizeof(CUipcMemHandle) == sizeof(ours::IpcHandle));
static_assert(sizeof(Op) == sizeof(ours::BatchOp));
static_assert(offsetof(Op, waitValue.address) == offsetof(ours::BatchOp, address));
static_assert(offsetof(Op, waitValue.value) == offsetof(ours::BatchOp, value));
static_assert(offsetof(Op, waitValue.flags) == offsetof(ours::BatchOp, flags));
static_assert(offsetof(Op, writeValue.address) == offsetof(ours::BatchOp, address));
static_assert(offsetof(Op, writeValue.value) == offsetof(ours::BatchOp, value));
static_assert(offsetof(Op, writeValue.flags) == offsetof(ours::BatchOp, flags));
static_assert(CU_STREAM_MEM_OP_WAIT_VALUE_32 == ours::kWaitValue);
static_assert(CU_STREAM_MEM_OP_WRITE_VALUE_32 == ours::kWriteValue);
static_assert(CU_STREAM_WAIT_VALUE_GEQ == ours::kGreaterOrEqual);
static_assert(CU_STREAM_WRITE_VALUE_DEFAULT == ours::kWithBarrier);
static_assert(CU_STREAM_NON_BLOCKING == ours::kNonBlocking);
static_assert(CU_STREAM_CAPTURE_MODE_RELAXED == ours::kRelaxed);
static_assert(CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS == ours::kLazyPeerAccess);
static_assert(CUDA_SUCCESS == ours::kSuccess && CUDA_ERROR_NOT_READY == ours::kNotReady);

}  // namespace
