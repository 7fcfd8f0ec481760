// SPDX-License-Identifier: Apache-2.0
// StreamPair: the stream that transfers run on, and how it meets the compute
// stream, which is always the current stream of the calling thread. One more, beside, is for
// copies within the device that are part of transfers and need no link.
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

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "runtime/comm/transport.h"

namespace deepcompile {

// A point in a stream's work.
class StreamMark {
 public:
  explicit StreamMark(c10::DeviceType type) : event_(type) {}
  // `number`: of the transfers' stream, counting up; 0 for others.
  void record(const c10::Stream& stream, uint64_t number) {
    event_.record(stream);
    number_ = number;
  }
  void block(const c10::Stream& stream) const { event_.block(stream); }  // it waits for this
  bool query() const { return event_.query(); }
  uint64_t number() const { return number_; }

 private:
  c10::Event event_;
  uint64_t number_ = 0;
};
using Mark = std::shared_ptr<const StreamMark>;

// Events that are used again, as making and destroying one for each transfer costs
// the driver as much as recording it, and an event that is destroyed may wait for
// its device. A stream that was told to wait for an event goes by what it marked
// at that time, so that it can be recorded anew at once.
class EventPool : public std::enable_shared_from_this<EventPool> {
 public:
  Mark record(const c10::Stream& stream, uint64_t number) {
    std::unique_ptr<StreamMark> mark = take();
    if (!mark) mark = std::make_unique<StreamMark>(stream.device_type());
    mark->record(stream, number);
    const auto give_back = [pool = shared_from_this()](StreamMark* used) {
      pool->give(std::unique_ptr<StreamMark>(used));
    };
    return {mark.release(), give_back};
  }

 private:
  std::unique_ptr<StreamMark> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) return nullptr;
    std::unique_ptr<StreamMark> mark = std::move(free_.back());
    free_.pop_back();
    return mark;
  }
  void give(std::unique_ptr<StreamMark> mark) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(mark));
  }

  std::mutex mutex_;
  std::vector<std::unique_ptr<StreamMark>> free_;
};

class StreamPair {
 public:
  explicit StreamPair(c10::Device device)
      : device_(device),
        guard_(device.type()),
        comm_(guard_.getStreamFromGlobalPool(device, /*isHighPriority=*/true)),
        beside_(guard_.getStreamFromGlobalPool(device, /*isHighPriority=*/true)) {}

  c10::Device device() const { return device_; }
  c10::Stream compute() const { return guard_.getStream(device_); }
  const c10::Stream& comm() const { return comm_; }
  const c10::Stream& beside() const { return beside_; }

  Mark mark(const c10::Stream& stream) const {
    return events_->record(stream, stream == comm_ ? ++marks_ : 0);
  }
  // What compute was given so far comes before the transfers' next work.
  void comm_follows_compute() const { mark(compute())->block(comm_); }
  void beside_follows_comm() const { mark(comm_)->block(beside_); }
  // What the transfers' stream did until the mark comes before compute's next work.
  // Nothing where compute waits for a later mark already.
  void compute_follows(const Mark& mark) const {
    const c10::Stream stream = compute();
    if (met_on_ == stream && mark->number() <= met_) return;
    mark->block(stream);
    met_on_ = stream;
    met_ = mark->number();
  }

 private:
  c10::Device device_;
  c10::impl::VirtualGuardImpl guard_;
  c10::Stream comm_;
  c10::Stream beside_;
  std::shared_ptr<EventPool> events_ = std::make_shared<EventPool>();
  mutable uint64_t marks_ = 0;                 // made on comm
  mutable uint64_t met_ = 0;                   // the last of them that compute waits for
  mutable std::optional<c10::Stream> met_on_;  // compute, then
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
    streams_->compute_follows(done_);
    done_.reset();
    buffers_.clear();
  }

 private:
  std::shared_ptr<const StreamPair> streams_;
  std::vector<at::Tensor> buffers_;
  Mark done_;
};

}  // namespace deepcompile
