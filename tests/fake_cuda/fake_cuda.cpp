// SPDX-License-Identifier: Apache-2.0
// What the runtime asks of libcuda, on a CPU: memory that other processes can
// map, streams that run their work at once, words that are waited for.
//
// A stream's work done at once, in the order it was given, is one order that a
// GPU may choose, and the hardest for a protocol of waits: what would wait for
// something given later hangs here.
//
// Tests reach the hooks below through ctypes: the library is loaded once.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <thread>

namespace {

using Address = unsigned long long;

constexpr int kSuccess = 0;
constexpr int kInvalidValue = 1;
constexpr int kOutOfMemory = 2;
constexpr int kInvalidDevice = 101;
constexpr int kInvalidContext = 201;
constexpr int kMapFailed = 205;
constexpr int kLaunchTimeout = 702;
constexpr int kNotSupported = 801;
constexpr int kDevices = 64;
constexpr auto kHang = std::chrono::seconds(60);  // a wait that nobody ends

struct Handle {
  char bytes[64];
};

struct BatchOp {
  int operation;  // 1: wait, 2: write
  Address address;
  uint64_t value;
  unsigned flags;
  Address alias;
  uint64_t rest;
};

struct Allocation {
  size_t bytes;
  int file;
};

// A process's link: how many copies use it now, in each direction. In memory that peers map.
struct Link {
  std::atomic<int> out;
  std::atomic<int> in;
};

struct Mapping {
  size_t bytes;
  Link* link;  // of the peer
};

std::mutex mutex;
std::map<Address, Allocation> own;
std::map<Address, Mapping> peers;
std::map<int, Link*> links;  // of peers, by process
int own_link_file = -1;
Link* own_link = nullptr;
std::map<std::string, std::atomic<int>> hooks;  // see fake_cuda_set
std::map<std::string, std::atomic<int>> counts;
int context;
thread_local int pushed_contexts = 0;

void count(const char* what) {
  const std::lock_guard<std::mutex> lock(mutex);
  ++counts[what];
}

int hook(const char* what) {
  const std::lock_guard<std::mutex> lock(mutex);
  return hooks[what];
}

// The link of the peer whose memory it is; null if it is no peer's.
Link* peer_of(Address address) {
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = peers.upper_bound(address);
  if (found == peers.begin()) return nullptr;
  --found;
  return address < found->first + found->second.bytes ? found->second.link : nullptr;
}

bool of_a_peer(Address address) {
  return peer_of(address) != nullptr;
}

// Takes the time of a copy between two links, and notes whether another uses one of them.
void cross(std::atomic<int>& out, std::atomic<int>& in, size_t bytes, const char* milliseconds) {
  const int watched = hook("watched_bytes");
  const bool watch = watched > 0 && bytes >= static_cast<size_t>(watched);
  if (watch && (out.fetch_add(1) > 0) + (in.fetch_add(1) > 0) > 0) count("meetings");
  std::this_thread::sleep_for(std::chrono::milliseconds(hook(milliseconds)));
  if (watch) {
    --out;
    --in;
  }
}

int copy_word(Address to, const void* from) {
  count("copied_words");
  if (hook("deaf") != 0 && of_a_peer(to)) return kSuccess;
  uint32_t value = 0;
  std::memcpy(&value, from, sizeof(value));
  __atomic_store_n(reinterpret_cast<uint32_t*>(to), value, __ATOMIC_RELEASE);
  return kSuccess;
}

void copy(Address to, Address from, size_t bytes) {
  if (bytes == sizeof(uint32_t)) {
    copy_word(to, reinterpret_cast<const void*>(from));
    return;
  }
  if (Link* const peer = peer_of(from)) {
    count("pulls");
    cross(peer->out, own_link->in, bytes, "pull_ms");
  }
  if (Link* const peer = peer_of(to)) {
    count("pushes");
    cross(own_link->out, peer->in, bytes, "push_ms");
  }
  std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
}

int wait(const BatchOp& op) {
  const auto value = static_cast<uint32_t>(op.value);
  if (hook("ignore_waits") != 0) return kSuccess;
  if (hook(value % 2 == 0 ? "ignore_even_waits" : "ignore_odd_waits") != 0) return kSuccess;
  const auto* word = reinterpret_cast<const uint32_t*>(op.address);
  const auto deadline = std::chrono::steady_clock::now() + kHang;
  while (static_cast<int32_t>(__atomic_load_n(word, __ATOMIC_ACQUIRE) - value) < 0) {
    if (std::chrono::steady_clock::now() > deadline) return kLaunchTimeout;
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  return kSuccess;
}

void* map_file(int file, size_t bytes) {
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  return memory == MAP_FAILED ? nullptr : memory;
}

void* map_of(int process, int file, size_t bytes) {
  const std::string path = "/proc/" + std::to_string(process) + "/fd/" + std::to_string(file);
  const int opened = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (opened < 0) return nullptr;
  void* const memory = map_file(opened, bytes);
  close(opened);
  return memory;
}

}  // namespace

extern "C" {

// Hooks: pull_ms and push_ms (each copy from or to a peer's memory takes so long), ignore_waits,
// ignore_odd_waits and ignore_even_waits (all waits, or those for such values, are over at once),
// no_memory (to allocate), no_handle (of own memory), no_access (between devices), no_mapping (of a
// peer's memory), deaf (peers' words are not written), no_remote_writes (of words, by streams),
// newer (this much than CUDA 13.0), watched_bytes (copies of so many are looked at for meetings).
void fake_cuda_set(const char* what, int value) {
  const std::lock_guard<std::mutex> lock(mutex);
  hooks[what] = value;
}

// Counts: pulls, pushes, allocations and mappings (those there are), writes, copied_words, batches
// (of writes and waits), threads (that leave captures alone), bare_threads (those of them without a
// context), meetings (copies that another copy shared a link with, when they started).
int fake_cuda_count(const char* what) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (std::strcmp(what, "allocations") == 0) return static_cast<int>(own.size());
  if (std::strcmp(what, "mappings") == 0) return static_cast<int>(peers.size());
  return counts[what];
}

int cuInit(unsigned) {
  return kSuccess;
}

int cuDriverGetVersion(int* version) {
  *version = 13000 + hook("newer");
  return kSuccess;
}

int cuGetErrorName(int error, const char** name) {
  static const std::map<int, const char*> names{{kInvalidValue, "CUDA_ERROR_INVALID_VALUE"},
                                                {kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY"},
                                                {kInvalidDevice, "CUDA_ERROR_INVALID_DEVICE"},
                                                {kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT"},
                                                {kMapFailed, "CUDA_ERROR_MAP_FAILED"},
                                                {kLaunchTimeout, "CUDA_ERROR_LAUNCH_TIMEOUT"}};
  const auto found = names.find(error);
  if (found == names.end()) return kInvalidValue;
  *name = found->second;
  return kSuccess;
}

int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal < kDevices ? kSuccess : kInvalidDevice;
}

int cuDeviceGetPCIBusId(char* text, int length, int device) {
  std::snprintf(text, static_cast<size_t>(length), "fake:%02d.0", device);
  return kSuccess;
}

int cuDeviceGetByPCIBusId(int* device, const char* text) {
  return std::sscanf(text, "fake:%d.0", device) == 1 ? kSuccess : kInvalidDevice;
}

int cuDeviceCanAccessPeer(int* can, int, int) {
  *can = hook("no_access") == 0 ? 1 : 0;
  return kSuccess;
}

int cuDevicePrimaryCtxRetain(void** found, int) {
  *found = &context;
  return kSuccess;
}

int cuDevicePrimaryCtxRelease_v2(int) {
  return kSuccess;
}
int cuCtxPushCurrent_v2(void* pushed) {
  if (pushed != &context) return kInvalidValue;
  ++pushed_contexts;
  return kSuccess;
}
int cuCtxPopCurrent_v2(void** popped) {
  if (pushed_contexts == 0) return kInvalidContext;
  --pushed_contexts;
  *popped = &context;
  return kSuccess;
}
int cuCtxGetCurrent(void** found) {
  *found = pushed_contexts > 0 ? &context : nullptr;
  return kSuccess;
}

int cuMemAlloc_v2(Address* address, size_t bytes) {
  if (hook("no_memory") != 0) return kOutOfMemory;
  const int file = memfd_create("fake_cuda", 0);
  if (file < 0 || ftruncate(file, static_cast<off_t>(bytes)) != 0) return kOutOfMemory;
  void* const memory = map_file(file, bytes);
  if (memory == nullptr) return kOutOfMemory;
  *address = reinterpret_cast<Address>(memory);
  std::memset(memory, 0xA5, 1 << 16);  // a device's memory is not zero
  const std::lock_guard<std::mutex> lock(mutex);
  if (own_link == nullptr) {
    own_link_file = memfd_create("fake_link", 0);
    if (ftruncate(own_link_file, sizeof(Link)) != 0) return kOutOfMemory;
    own_link = static_cast<Link*>(map_file(own_link_file, sizeof(Link)));
  }
  own[*address] = {bytes, file};
  return kSuccess;
}

int cuMemFree_v2(Address address) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = own.find(address);
  if (found == own.end()) return kInvalidValue;
  munmap(reinterpret_cast<void*>(address), found->second.bytes);
  close(found->second.file);
  own.erase(found);
  return kSuccess;
}

int cuIpcGetMemHandle(Handle* handle, Address address) {
  if (hook("no_handle") != 0) return kInvalidValue;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = own.find(address);
  if (found == own.end()) return kInvalidValue;
  std::snprintf(handle->bytes, sizeof(handle->bytes), "%d %d %zu %d", getpid(), found->second.file,
                found->second.bytes, own_link_file);
  return kSuccess;
}

int cuIpcOpenMemHandle_v2(Address* address, Handle handle, unsigned flags) {
  int process = 0;
  int file = 0;
  size_t bytes = 0;
  int link = 0;
  if (flags != 1 ||
      std::sscanf(handle.bytes, "%d %d %zu %d", &process, &file, &bytes, &link) != 4) {
    return kInvalidValue;
  }
  void* const memory = hook("no_mapping") != 0 ? nullptr : map_of(process, file, bytes);
  if (memory == nullptr) return kMapFailed;
  *address = reinterpret_cast<Address>(memory);
  const std::lock_guard<std::mutex> lock(mutex);
  Link*& known = links[process];
  if (known == nullptr) known = static_cast<Link*>(map_of(process, link, sizeof(Link)));
  if (known == nullptr) return kMapFailed;
  peers[*address] = {bytes, known};
  return kSuccess;
}

int cuIpcCloseMemHandle(Address address) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = peers.find(address);
  if (found == peers.end()) return kInvalidValue;
  munmap(reinterpret_cast<void*>(address), found->second.bytes);
  peers.erase(found);
  return kSuccess;
}

int cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, void*) {
  if (pushed_contexts == 0) return kInvalidContext;
  copy(to, from, bytes);
  return kSuccess;
}

int cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t bytes, void*) {
  if (bytes == sizeof(uint32_t)) return copy_word(to, from);
  std::memcpy(reinterpret_cast<void*>(to), from, bytes);
  return kSuccess;
}

int cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes, void*) {
  std::memcpy(to, reinterpret_cast<const void*>(from), bytes);
  return kSuccess;
}

int cuStreamBatchMemOp_v2(void*, unsigned ops, BatchOp* op, unsigned flags) {
  if (pushed_contexts == 0) return kInvalidContext;
  if (flags != 0 || ops > 256) return kInvalidValue;
  if (hook("no_batches") != 0) return kNotSupported;
  count("batches");
  for (unsigned i = 0; i < ops; ++i) {
    if (op[i].flags != 0 || op[i].address % 4 != 0) return kInvalidValue;
    if (op[i].operation == 1) {
      if (const int result = wait(op[i]); result != kSuccess) return result;
    } else if (op[i].operation == 2) {
      count("writes");
      if (hook("no_remote_writes") != 0 && of_a_peer(op[i].address)) return kInvalidValue;
      if (hook("deaf") != 0 && of_a_peer(op[i].address)) continue;
      __atomic_store_n(reinterpret_cast<uint32_t*>(op[i].address),
                       static_cast<uint32_t>(op[i].value), __ATOMIC_RELEASE);
    } else {
      return kInvalidValue;
    }
  }
  return kSuccess;
}

int cuStreamCreate(void** stream, unsigned) {
  *stream = &context;
  return kSuccess;
}

int cuStreamDestroy_v2(void*) {
  return kSuccess;
}
int cuStreamQuery(void*) {
  return kSuccess;
}
int cuStreamSynchronize(void*) {
  return kSuccess;
}

int cuThreadExchangeStreamCaptureMode(int* mode) {
  count(pushed_contexts > 0 ? "threads" : "bare_threads");
  *mode = 0;
  return kSuccess;
}

}  // extern "C"
