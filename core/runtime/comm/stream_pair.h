// SPDX-License-Identifier: Apache-2.0
// StreamPair: the stream that transfers run on, and how it meets the compute
// stream, which is always the current stream of the calling thread.
//
// All transports of a runtime share one, so that transfers of any kind run one
// after another in the order they were started.
//
// Callers: transports, under the runtime's lock. Marks may be asked and dropped by
// any thread.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "runtime/comm/transport.h"

namespace deepcompile {

// A point in a stream's work; `block` makes another stream wait for it.
using Mark = std::shared_ptr<const c10::Event>;

// Events that are used again, as making and destroying one for each transfer costs
// the driver as much as recording it, and an event that is destroyed may wait for
// its device. A stream that was told to wait for an event goes by what it marked
// at that time, so that it can be recorded anew at once.
class EventPool : public std::enable_shared_from_this<EventPool> {
 public:
  Mark record(const c10::Stream& stream) {
    std::unique_ptr<c10::Event> event = take();
    if (!event) event = std::make_unique<c10::Event>(stream.device_type());
    event->record(stream);
    const auto give_back = [pool = shared_from_this()](c10::Event* used) {
      pool->give(std::unique_ptr<c10::Event>(used));
    };
    return {event.release(), give_back};
  }

 private:
  std::unique_ptr<c10::Event> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) return nullptr;
    std::unique_ptr<c10::Event> event = std::move(free_.back());
    free_.pop_back();
    return event;
  }
  void give(std::unique_ptr<c10::Event> event) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(event));
  }

  std::mutex mutex_;
  std::vector<std::unique_ptr<c10::Event>> free_;
};

class StreamPair {
 public:
  explicit StreamPair(c10::Device device)
      : device_(device),
        guard_(device.type()),
        comm_(guard_.getStreamFromGlobalPool(device, /*isHighPriority=*/true)) {}

  c10::Device device() const { return device_; }
  c10::Stream compute() const { return guard_.getStream(device_); }
  const c10::Stream& comm() const { return comm_; }

  Mark mark(const c10::Stream& stream) const { return events_->record(stream); }
  // What compute was given so far comes before the transfers' next work.
  void comm_follows_compute() const { mark(compute())->block(comm_); }

 private:
  c10::Device device_;
  c10::impl::VirtualGuardImpl guard_;
  c10::Stream comm_;
  std::shared_ptr<EventPool> events_ = std::make_shared<EventPool>();
};

// What was started on the transfers' stream last, and the buffers it uses.
class StreamTransfer : public Transfer {
 public:
  // `done`: after its work.
  StreamTransfer(std::shared_ptr<const StreamPair> streams, std::vector<at::Tensor> buffers,
                 Mark done)
      : streams_(std::move(streams)), buffers_(std::move(buffers)), done_(std::move(done)) {}
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
    done_->block(streams_->compute());
    done_.reset();
    buffers_.clear();
  }

 private:
  std::shared_ptr<const StreamPair> streams_;
  std::vector<at::Tensor> buffers_;
  Mark done_;
};

}  // namespace deepcompile
