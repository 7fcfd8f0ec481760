// SPDX-License-Identifier: Apache-2.0
#include "runtime/comm/driver.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <utility>

#include "runtime/comm/driver_functions.h"
#include "runtime/comm/transport.h"

namespace deepcompile {

using namespace cuda_driver;

namespace {

constexpr size_t kMostOps = 256;          // of one cuStreamBatchMemOp
constexpr std::size_t kBusIdLength = 32;  // of "0000:3b:00.0"

}  // namespace

struct Driver::Functions : cuda_driver::Functions {
  explicit Functions(const std::string& library);
};

Driver::Functions::Functions(const std::string& library) {
  // Never closed: torch holds the real one anyway, and a driver may not be unloaded.
  void* const handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* const why = dlerror();
    throw TransportError(why != nullptr ? why : "cannot load " + library);
  }
  const auto find = [&](const char* name, auto* function) {
    void* const symbol = dlsym(handle, name);
    if (symbol == nullptr) throw TransportError(library + " has no function " + name);
    *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(symbol);
  };
  find("cuInit", &init);
  find("cuDriverGetVersion", &version);
  find("cuGetErrorName", &error_name);
  find("cuDeviceGet", &device_get);
  find("cuDeviceGetPCIBusId", &device_bus_id);
  find("cuDeviceGetByPCIBusId", &device_by_bus_id);
  find("cuDeviceCanAccessPeer", &can_access);
  find("cuDevicePrimaryCtxRetain", &retain);
  find("cuDevicePrimaryCtxRelease_v2", &release);
  find("cuCtxPushCurrent_v2", &push);
  find("cuCtxPopCurrent_v2", &pop);
  find("cuCtxGetCurrent", &current);
  find("cuMemAlloc_v2", &allocate);
  find("cuMemFree_v2", &free);
  find("cuIpcGetMemHandle", &ipc_get);
  find("cuIpcOpenMemHandle_v2", &ipc_open);
  find("cuIpcCloseMemHandle", &ipc_close);
  find("cuMemcpyDtoDAsync_v2", &copy);
  find("cuMemcpyDtoHAsync_v2", &copy_to_host);
  find("cuMemcpyHtoDAsync_v2", &copy_to_device);
  find("cuStreamBatchMemOp_v2", &batch_ops);
  find("cuStreamCreate", &stream_create);
  find("cuStreamDestroy_v2", &stream_destroy);
  find("cuStreamQuery", &stream_query);
  find("cuStreamSynchronize", &stream_synchronize);
  find("cuThreadExchangeStreamCaptureMode", &capture_mode);
}

// The device's context on this thread, and what was there before afterwards.
class Driver::Current {
 public:
  explicit Current(const Driver& driver) {
    void* now = nullptr;
    driver.check(driver.functions_->current(&now), "cuCtxGetCurrent");
    if (now == driver.context_) return;  // torch's threads have it
    driver.check(driver.functions_->push(driver.context_), "cuCtxPushCurrent");
    pop_ = driver.functions_->pop;
  }
  ~Current() {
    void* context = nullptr;
    if (pop_ != nullptr) pop_(&context);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  int (*pop_)(void**) = nullptr;  // null: it was there
};

Driver::Driver(const std::string& library, int device)
    : functions_(std::make_unique<Functions>(library)) {
  check(functions_->init(0), "cuInit");
  check(functions_->device_get(&device_, device), "cuDeviceGet");
  check(functions_->retain(&context_, device_), "cuDevicePrimaryCtxRetain");
  try {
    const Current current(*this);
    check(functions_->stream_create(&side_, kNonBlocking), "cuStreamCreate");
  } catch (...) {
    functions_->release(device_);
    throw;
  }
}

Driver::~Driver() {
  // At the process's end the driver may be gone already, and answers with errors.
  void* context = nullptr;
  if (functions_->push(context_) == kSuccess) {
    functions_->stream_destroy(side_);
    functions_->pop(&context);
  }
  functions_->release(device_);
}

void Driver::check(int result, const char* function) const {
  if (result == kSuccess) return;
  const char* name = nullptr;
  const bool known = functions_->error_name(result, &name) == kSuccess && name != nullptr;
  throw TransportError(std::string(function) + ": " +
                       (known ? name : "error " + std::to_string(result)));
}

std::string Driver::bus_id() const {
  std::array<char, kBusIdLength> text{};
  check(functions_->device_bus_id(text.data(), static_cast<int>(text.size()) - 1, device_),
        "cuDeviceGetPCIBusId");
  return text.data();
}

std::string Driver::why_no_access(const std::string& peer_bus_id) const {
  int peer = -1;
  if (functions_->device_by_bus_id(&peer, peer_bus_id.c_str()) != kSuccess) {
    return "GPU " + peer_bus_id + " is not visible to this process (CUDA_VISIBLE_DEVICES)";
  }
  if (peer == device_) return "two ranks use GPU " + peer_bus_id;
  int can = 0;
  check(functions_->can_access(&can, device_, peer), "cuDeviceCanAccessPeer");
  return can != 0 ? "" : "GPU " + bus_id() + " cannot access the memory of GPU " + peer_bus_id;
}

int Driver::version() const {
  int version = 0;
  check(functions_->version(&version), "cuDriverGetVersion");
  return version;
}

DeviceAddress Driver::allocate(int64_t bytes) const {
  const Current current(*this);
  DeviceAddress address = 0;
  check(functions_->allocate(&address, static_cast<size_t>(bytes)), "cuMemAlloc");
  return address;
}

void Driver::free(DeviceAddress address) const {
  const Current current(*this);
  check(functions_->free(address), "cuMemFree");
}

IpcHandle Driver::share(DeviceAddress address) const {
  const Current current(*this);
  IpcHandle handle;
  check(functions_->ipc_get(&handle, address), "cuIpcGetMemHandle");
  return handle;
}

DeviceAddress Driver::open(const IpcHandle& handle) const {
  const Current current(*this);
  DeviceAddress address = 0;
  check(functions_->ipc_open(&address, handle, kLazyPeerAccess), "cuIpcOpenMemHandle");
  return address;
}

void Driver::close(DeviceAddress address) const {
  const Current current(*this);
  check(functions_->ipc_close(address), "cuIpcCloseMemHandle");
}

void Driver::copy(const std::vector<DeviceCopy>& copies, Stream stream) const {
  const Current current(*this);
  for (const DeviceCopy& copy : copies) {
    check(functions_->copy(copy.to, copy.from, static_cast<size_t>(copy.bytes), stream),
          "cuMemcpyDtoDAsync");
  }
}

void Driver::run(std::vector<MemoryOp> ops, Stream stream) const {
  if (ops.empty()) return;
  const Current current(*this);
  std::vector<BatchOp> batch;
  batch.reserve(ops.size());
  for (const MemoryOp& op : ops) {
    const bool waits = op.kind == MemoryOp::Kind::kWaitAtLeast;
    batch.push_back({.operation = waits ? kWaitValue : kWriteValue,
                     .address = op.address,
                     .value = op.value,
                     .flags = waits ? kGreaterOrEqual : kWithBarrier,
                     .alias = 0,
                     .rest = 0});
  }
  for (size_t first = 0; first < batch.size(); first += kMostOps) {
    const size_t count = std::min(kMostOps, batch.size() - first);
    check(functions_->batch_ops(stream, static_cast<unsigned>(count), &batch[first], 0),
          "cuStreamBatchMemOp");
  }
}

bool Driver::idle(Stream stream) const {
  const Current current(*this);
  const int result = functions_->stream_query(stream);
  if (result == kNotReady) return false;
  check(result, "cuStreamQuery");
  return true;
}

void Driver::serve_this_thread() const {
  check(functions_->push(context_), "cuCtxPushCurrent");  // until the thread ends
  int mode = kRelaxed;
  check(functions_->capture_mode(&mode), "cuThreadExchangeStreamCaptureMode");
}

void Driver::finish_side() const {
  check(functions_->stream_synchronize(side_), "cuStreamSynchronize");
}

std::vector<uint32_t> Driver::read(DeviceAddress address, int64_t words) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<uint32_t> found(static_cast<size_t>(words));
  const Current current(*this);
  const size_t bytes = found.size() * sizeof(uint32_t);
  check(functions_->copy_to_host(found.data(), address, bytes, side_), "cuMemcpyDtoHAsync");
  finish_side();
  return found;
}

void Driver::write(DeviceAddress address, uint32_t value) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!copies_words_) run({{MemoryOp::Kind::kWrite, address, value}}, side_);
  const Current current(*this);
  if (copies_words_) {
    check(functions_->copy_to_device(address, &value, sizeof(value), side_), "cuMemcpyHtoDAsync");
  }
  finish_side();
}

}  // namespace deepcompile
