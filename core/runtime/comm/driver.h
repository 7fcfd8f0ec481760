// SPDX-License-Identifier: Apache-2.0
// Driver: the few functions of the CUDA driver that one-sided transfers need.
//
// They are looked up in libcuda when the first engine asks, so the runtime
// builds and runs without CUDA's headers and without a GPU. Each call makes the
// device's primary context, the one torch uses, current for its duration, if it
// is not.
//
// Callers: PeerMemory, the copy engine transport and its watch; any thread.
// Methods throw TransportError with the driver's name for what went wrong.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "runtime/comm/driver_functions.h"

namespace deepcompile {

using DeviceAddress = cuda_driver::Address;
using IpcHandle = cuda_driver::IpcHandle;

// One step of a stream that writes, or waits for, a 32-bit word of this device's memory, or
// writes one of a peer's.
struct MemoryOp {
  enum class Kind { kWrite, kWaitAtLeast };  // at least: as differences of 32 bits go round
  Kind kind = Kind::kWrite;
  DeviceAddress address = 0;
  uint32_t value = 0;
};

struct DeviceCopy {
  DeviceAddress to = 0;
  DeviceAddress from = 0;
  int64_t bytes = 0;
};

class Driver {
 public:
  using Stream = void*;  // CUstream; null: the default stream

  // `library`: a file name for dlopen. `device`: its number in this process.
  // Throws TransportError naming the library or the function that is missing.
  Driver(const std::string& library, int device);
  ~Driver();
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;

  int version() const;  // of CUDA: 13010 is 13.1
  // The device's PCI address: the same in every process of the host.
  std::string bus_id() const;
  // Why this device cannot read the memory of that one; empty if it can.
  std::string why_no_access(const std::string& peer_bus_id) const;
  // Whether a stream's write of a word cannot reach a peer's memory, so that it is copied there.
  // Found out by who connects the peers.
  bool copies_words() const { return copies_words_; }
  void set_copies_words(bool copies) { copies_words_ = copies; }

  DeviceAddress allocate(int64_t bytes) const;
  void free(DeviceAddress address) const;
  IpcHandle share(DeviceAddress address) const;
  DeviceAddress open(const IpcHandle& handle) const;
  void close(DeviceAddress address) const;

  // In the stream's order; the host goes on.
  void copy(const std::vector<DeviceCopy>& copies, Stream stream) const;
  void run(std::vector<MemoryOp> ops, Stream stream) const;
  bool idle(Stream stream) const;  // all that was started on it is over

  // For a thread that this library starts: the device's context is current on it
  // from now on, and its calls do not break a capture of a CUDA graph on another
  // thread. On a new thread device 0 is current, and CUDA's runtime makes a context
  // there, of 0.5 GB, for a rank of another device that so much as asks an event.
  void serve_this_thread() const;
  // On a stream of the driver's own, beside whatever others wait for; over on return.
  std::vector<uint32_t> read(DeviceAddress address, int64_t words) const;
  void write(DeviceAddress address, uint32_t value) const;

 private:
  struct Functions;
  class Current;

  void check(int result, const char* function) const;
  void finish_side() const;

  std::unique_ptr<Functions> functions_;
  int device_ = 0;           // CUdevice
  void* context_ = nullptr;  // CUcontext, retained
  Stream side_ = nullptr;    // the driver's own
  bool copies_words_ = false;
  mutable std::mutex mutex_;  // of `side_`
};

}  // namespace deepcompile
