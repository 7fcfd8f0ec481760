// SPDX-License-Identifier: Apache-2.0
#include "runtime/offload/host_link.h"

#include <ATen/ops/empty.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>

namespace deepcompile {
namespace {

constexpr int64_t kPage = 4096;  // bytes; sizes are rounded up, so that near ones share buffers

}  // namespace

HostBuffer& HostBuffer::operator=(HostBuffer&& other) noexcept {
  if (this == &other) return *this;
  give_back();
  pool_ = std::move(other.pool_);
  bytes_ = std::move(other.bytes_);
  return *this;
}

HostBuffer::~HostBuffer() {
  give_back();
}

void HostBuffer::give_back() noexcept {
  if (pool_ && bytes_.defined()) pool_->give(std::move(bytes_));
  pool_.reset();
  bytes_.reset();
}

at::Tensor HostBuffer::flat(int64_t numel, c10::ScalarType dtype) const {
  return bytes_.view(dtype).narrow(0, 0, numel);
}

HostBuffer HostPool::take(int64_t bytes) {
  const int64_t size = std::max<int64_t>(kPage, (bytes + kPage - 1) / kPage * kPage);
  const std::lock_guard lock(mutex_);
  at::Tensor found;
  const auto fit = free_.find(size);
  if (fit != free_.end()) {
    found = std::move(fit->second);
    free_.erase(fit);
    kept_ -= size;
  } else {
    while (!free_.empty() && lent_ + kept_ + size > most_lent_) {
      kept_ -= free_.begin()->first;
      free_.erase(free_.begin());
    }
    const auto options = c10::TensorOptions().dtype(c10::kByte).device(c10::kCPU);
    found = at::empty({size}, options.pinned_memory(pinned_));
  }
  lent_ += size;
  most_lent_ = std::max(most_lent_, lent_);
  return {shared_from_this(), std::move(found)};
}

void HostPool::give(at::Tensor bytes) noexcept {
  const std::lock_guard lock(mutex_);
  const int64_t size = bytes.numel();
  lent_ -= size;
  kept_ += size;
  free_.emplace(size, std::move(bytes));
}

int64_t HostPool::lent() const {
  const std::lock_guard lock(mutex_);
  return lent_;
}

int64_t HostPool::kept() const {
  const std::lock_guard lock(mutex_);
  return kept_;
}

HostCopy& HostCopy::operator=(HostCopy&& other) noexcept {
  if (this == &other) return *this;
  finish();
  tensors_ = std::move(other.tensors_);
  done_ = std::move(other.done_);
  other.done_.reset();
  return *this;
}

void HostCopy::wait() {
  if (done_) {
    // Order: copy (its direction's stream) -> use, or reuse of the device
    // memory, which was allocated on the compute stream (compute).
    const c10::impl::VirtualGuardImpl guard(done_->device_type());
    done_->block(guard.getStream(done_->device()));
  }
  done_.reset();
  tensors_.clear();
}

void HostCopy::finish() noexcept {
  try {
    if (done_) done_->synchronize();
  } catch (const std::exception&) {  // the device is lost; whoever uses it next reports that
  }
  done_.reset();
  tensors_.clear();
}

HostLink::HostLink(c10::Device device) : device_(device) {
  if (device.is_cpu()) return;
  const c10::impl::VirtualGuardImpl guard(device.type());
  out_ = guard.getStreamFromGlobalPool(device, /*isHighPriority=*/false);
  in_ = guard.getStreamFromGlobalPool(device, /*isHighPriority=*/false);
}

HostCopy HostLink::out(const Pairs& pairs, const std::shared_ptr<Span>& span) {
  return start(out_, pairs, span);
}

HostCopy HostLink::in(const Pairs& pairs, const std::shared_ptr<Span>& span) {
  return start(in_, pairs, span);
}

HostCopy HostLink::start(const std::optional<c10::Stream>& stream, const Pairs& pairs,
                         const std::shared_ptr<Span>& span) const {
  const c10::OptionalStreamGuard on_stream([&]() -> std::optional<c10::Stream> {
    if (!stream) return std::nullopt;
    // Order out: producer (compute) -> copy (out). The host buffer's last reader
    // was a copy in, which compute has waited for.
    // Order in: whatever used the new memory before, and the copy out that
    // filled the host buffer, which compute waited for at its eviction
    // (compute) -> copy (in).
    c10::Event ready(device_.type());
    ready.record(c10::impl::VirtualGuardImpl(device_.type()).getStream(device_));
    ready.block(*stream);
    return stream;
  }());
  if (span) span->start(stream);
  std::vector<at::Tensor> tensors;
  for (const auto& [from, to] : pairs) {
    to.copy_(from, /*non_blocking=*/true);
    tensors.push_back(from);
    tensors.push_back(to);
  }
  if (span) span->stop(stream);
  if (!stream) return {};
  c10::Event done(device_.type());
  done.record(*stream);
  return {std::move(tensors), std::move(done)};
}

at::Tensor flat_memory(const at::Tensor& tensor) {
  return tensor.as_strided({tensor.numel()}, {1}, tensor.storage_offset());
}

}  // namespace deepcompile
