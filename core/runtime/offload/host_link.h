// SPDX-License-Identifier: Apache-2.0
// HostLink: copies between the device and host memory, each direction on a
// stream of its own. Host memory is pinned; on a CPU device it is plain memory
// and a copy is done when it returns.
//
// Callers: the movers of states and values, under the runtime's lock. Buffers
// and copies may be destroyed on any thread (a token's deleter does).
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "runtime/trace.h"

namespace deepcompile {

class HostPool;

// Host bytes lent by a pool; they go back with the object.
class HostBuffer {
 public:
  HostBuffer() = default;
  HostBuffer(std::shared_ptr<HostPool> pool, at::Tensor bytes)
      : pool_(std::move(pool)), bytes_(std::move(bytes)) {}
  HostBuffer(HostBuffer&& other) noexcept = default;
  HostBuffer& operator=(HostBuffer&& other) noexcept;
  ~HostBuffer();

  bool defined() const { return bytes_.defined(); }
  // The first elements, 1-D, of type `dtype`.
  at::Tensor flat(int64_t numel, c10::ScalarType dtype) const;

 private:
  void give_back() noexcept;

  std::shared_ptr<HostPool> pool_;
  at::Tensor bytes_;
};

// Host memory that one step gives back and the next takes again: pinning is
// slow. Holds at most the most bytes that were ever lent at one time.
class HostPool : public std::enable_shared_from_this<HostPool> {
 public:
  explicit HostPool(bool pinned) : pinned_(pinned) {}
  HostBuffer take(int64_t bytes);
  int64_t lent() const;  // bytes
  int64_t kept() const;  // bytes not lent

 private:
  friend class HostBuffer;
  void give(at::Tensor bytes) noexcept;

  const bool pinned_;
  mutable std::mutex mutex_;
  std::multimap<int64_t, at::Tensor> free_;  // by size
  int64_t lent_ = 0;
  int64_t kept_ = 0;
  int64_t most_lent_ = 0;
};

// Copies under way, all in one direction. Destroying one that was not waited
// for waits on the host: nobody may take the memory it still writes.
class HostCopy {
 public:
  HostCopy() = default;
  HostCopy(std::vector<at::Tensor> tensors, std::optional<c10::Event> done)
      : tensors_(std::move(tensors)), done_(std::move(done)) {}
  HostCopy(HostCopy&&) noexcept = default;
  HostCopy& operator=(HostCopy&& other) noexcept;
  ~HostCopy() { finish(); }

  // The current stream's next work comes after the copies.
  void wait();
  // The copies are done on return.
  void finish() noexcept;

 private:
  std::vector<at::Tensor> tensors_;  // alive until the copies are waited for
  std::optional<c10::Event> done_;   // none on a CPU
};

class HostLink {
 public:
  // (from, to): both 1-D, contiguous, of one type and size; one of each on the host.
  using Pairs = std::vector<std::pair<at::Tensor, at::Tensor>>;

  explicit HostLink(c10::Device device);

  HostCopy out(const Pairs& pairs, const std::shared_ptr<Span>& span);
  HostCopy in(const Pairs& pairs, const std::shared_ptr<Span>& span);
  c10::Device device() const { return device_; }

 private:
  HostCopy start(const std::optional<c10::Stream>& stream, const Pairs& pairs,
                 const std::shared_ptr<Span>& span) const;

  c10::Device device_;
  std::optional<c10::Stream> out_;  // none on a CPU
  std::optional<c10::Stream> in_;
};

// A dense tensor's elements in the order of its memory, as one dimension.
at::Tensor flat_memory(const at::Tensor& tensor);

}  // namespace deepcompile
