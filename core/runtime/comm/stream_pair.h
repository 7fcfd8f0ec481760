// SPDX-License-Identifier: Apache-2.0
// StreamPair: the stream that transfers run on, and how it meets the compute
// stream, which is always the current stream of the calling thread.
//
// All transports of a runtime share one, so that transfers of any kind run one
// after another in the order they were started.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <memory>
#include <utility>
#include <vector>

#include "runtime/comm/transport.h"

namespace deepcompile {

class StreamPair {
 public:
  explicit StreamPair(c10::Device device)
      : device_(device),
        guard_(device.type()),
        comm_(guard_.getStreamFromGlobalPool(device, /*isHighPriority=*/true)) {}

  c10::Device device() const { return device_; }
  c10::Stream compute() const { return guard_.getStream(device_); }
  const c10::Stream& comm() const { return comm_; }

  c10::Event mark(const c10::Stream& stream) const {
    c10::Event event(device_.type());
    event.record(stream);
    return event;
  }

 private:
  c10::Device device_;
  c10::impl::VirtualGuardImpl guard_;
  c10::Stream comm_;
};

// What was started on the transfers' stream last, and the buffers it uses.
class StreamTransfer : public Transfer {
 public:
  StreamTransfer(std::shared_ptr<const StreamPair> streams, std::vector<at::Tensor> buffers)
      : streams_(std::move(streams)),
        buffers_(std::move(buffers)),
        done_(streams_->mark(streams_->comm())) {}
  ~StreamTransfer() override {
    try {
      meet();
    } catch (...) {  // the device is lost; whoever uses it next reports that
    }
  }

  void wait() override { meet(); }

 protected:
  void meet() {
    if (buffers_.empty()) return;
    // Order: transfer (comm) -> use, or reuse of the buffers' memory (compute).
    // The buffers were allocated on the compute stream, so dropping them here
    // gives them back to that stream only after the transfer.
    done_.block(streams_->compute());
    buffers_.clear();
  }

 private:
  std::shared_ptr<const StreamPair> streams_;
  std::vector<at::Tensor> buffers_;
  c10::Event done_;
};

}  // namespace deepcompile
