// SPDX-License-Identifier: Apache-2.0
#include "runtime/comm/c10d_transport.h"

#include <c10/core/StreamGuard.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <utility>

#include "base/error.h"
#include "runtime/comm/absent_ranks.h"

namespace deepcompile {
namespace {

using Group = c10::intrusive_ptr<c10d::ProcessGroup>;
using Work = c10::intrusive_ptr<c10d::Work>;
using std::chrono::milliseconds;

// Runs `call`, turning what c10d throws into a TransportError.
template <typename Call>
auto translated(Call&& call) -> decltype(call()) {
  try {
    return call();
  } catch (const c10::Error& error) {
    throw TransportError(error.what_without_backtrace());
  } catch (const std::exception& error) {
    throw TransportError(error.what());
  }
}

// The collectives both kinds use; `async` is c10d's asyncOp.
class Collectives {
 public:
  Collectives(Group group, milliseconds timeout, bool async)
      : group_(std::move(group)), timeout_(timeout), async_(async) {}

  Work gather(at::Tensor& full, at::Tensor& shard) const {
    return group_->_allgather_base(full, shard, with_timeout(c10d::AllgatherOptions{}));
  }
  Work reduce_scatter(at::Tensor& piece, at::Tensor& full) const {
    return group_->_reduce_scatter_base(piece, full, with_timeout(c10d::ReduceScatterOptions{}));
  }
  Work all_reduce(const at::Tensor& tensor, Reduction reduction) const {
    c10d::AllreduceOptions options;
    options.reduceOp = reduction == Reduction::kSum ? c10d::ReduceOp::SUM : c10d::ReduceOp::MAX;
    std::vector<at::Tensor> tensors{tensor};
    return group_->allreduce(tensors, with_timeout(std::move(options)));
  }
  Work broadcast(const at::Tensor& tensor) const {
    std::vector<at::Tensor> tensors{tensor};
    return group_->broadcast(tensors, with_timeout(c10d::BroadcastOptions{}));
  }
  Work barrier(c10::Device device) const {
    c10d::BarrierOptions options;
    if (!device.is_cpu()) options.device = device;
    return group_->barrier(with_timeout(std::move(options)));
  }

 private:
  template <typename Options>
  Options with_timeout(Options options) const {
    options.timeout = timeout_;
    options.asyncOp = async_;
    return options;
  }

  Group group_;
  milliseconds timeout_;
  bool async_;
};

// Waits on the host for collectives, and says who did not come to the first that fails. c10d's own
// timeout runs from the moment an operation starts on its worker thread; this one from the moment
// we wait.
class HostWaits {
 public:
  HostWaits(Group group, milliseconds timeout)
      : timeout_(timeout),
        transport_(next_of(group->getGroupName())),
        absent_(std::move(group), std::min(kPatience, timeout / 2)) {}

  // The transport's `number`-th collective.
  void wait(const Work& work, int64_t number) {
    try {
      translated([&] { work->wait(timeout_); });
    } catch (const TransportError& error) {
      if (failed_.exchange(true)) throw;  // ranks no longer count alike
      const std::string name = std::to_string(transport_) + "/" + std::to_string(number);
      throw TransportError(error.what() + absent_.describe(name));
    }
  }

 private:
  static constexpr milliseconds kPatience{3000};

  // A group's transports are made in the ranks' one order.
  static int64_t next_of(const std::string& group) {
    static std::mutex mutex;
    static std::map<std::string, int64_t> transports;
    const std::lock_guard<std::mutex> lock(mutex);
    return ++transports[group];
  }

  milliseconds timeout_;
  int64_t transport_;
  AbsentRanks absent_;
  std::atomic<bool> failed_ = false;
};

class HostTransfer final : public Transfer {
 public:
  // `span`: stopped when the wait is over; null if something else stops it.
  HostTransfer(Work work, int64_t number, std::shared_ptr<HostWaits> waits,
               std::shared_ptr<Span> span)
      : work_(std::move(work)), number_(number), waits_(std::move(waits)), span_(std::move(span)) {}

  void wait() override {
    if (!work_) return;
    const Work work = std::exchange(work_, nullptr);
    waits_->wait(work, number_);
    if (span_) span_->stop(std::nullopt);
  }

 private:
  Work work_;  // holds the tensors until the backend is done with them
  int64_t number_;
  std::shared_ptr<HostWaits> waits_;
  std::shared_ptr<Span> span_;
};

// Whether the work tells when it is over. Gloo's reduce-scatter does not.
bool stops_by_itself(const Work& work, const std::shared_ptr<Span>& span) {
  try {
    work->getFuture()->addCallback([span](c10::ivalue::Future&) { span->stop(std::nullopt); });
    return true;
  } catch (const c10::Error&) {
    return false;
  }
}

class HostTransport final : public Transport {
 public:
  HostTransport(Group group, milliseconds timeout)
      : collectives_(group, timeout, /*async=*/true),
        waits_(std::make_shared<HostWaits>(std::move(group), timeout)) {}

  std::unique_ptr<Transfer> gather(at::Tensor full, at::Tensor shard,
                                   std::shared_ptr<Span> span) override {
    return start(std::move(span), [&] { return collectives_.gather(full, shard); });
  }
  std::unique_ptr<Transfer> reduce_scatter(at::Tensor piece, at::Tensor full,
                                           std::shared_ptr<Span> span) override {
    return start(std::move(span), [&] { return collectives_.reduce_scatter(piece, full); });
  }
  std::unique_ptr<Transfer> start_all_reduce(at::Tensor tensor, Reduction reduction) override {
    return start(nullptr, [&] { return collectives_.all_reduce(tensor, reduction); });
  }
  void all_reduce(at::Tensor tensor, Reduction reduction) override {
    finish([&] { return collectives_.all_reduce(tensor, reduction); });
  }
  void broadcast(at::Tensor tensor) override {
    finish([&] { return collectives_.broadcast(tensor); });
  }
  void barrier() override {
    finish([&] { return collectives_.barrier(c10::Device(c10::kCPU)); });
  }
  bool in_order(int64_t) const override { return false; }

 private:
  template <typename Call>
  std::unique_ptr<Transfer> start(std::shared_ptr<Span> span, Call&& call) {
    if (span) span->start(std::nullopt);
    const int64_t number = ++started_;
    Work work = translated(call);
    if (span && stops_by_itself(work, span)) span = nullptr;
    return std::make_unique<HostTransfer>(std::move(work), number, waits_, std::move(span));
  }
  template <typename Call>
  void finish(Call&& call) {
    const int64_t number = ++started_;
    waits_->wait(translated(call), number);
  }

  Collectives collectives_;
  std::shared_ptr<HostWaits> waits_;
  int64_t started_ = 0;  // collectives; as many on every rank, as they start in one order
};

class StreamTransport final : public Transport {
 public:
  StreamTransport(Group group, std::shared_ptr<const StreamPair> streams, milliseconds timeout)
      : streams_(std::move(streams)), collectives_(std::move(group), timeout, /*async=*/false) {}

  std::unique_ptr<Transfer> gather(at::Tensor full, at::Tensor shard,
                                   std::shared_ptr<Span> span) override {
    return start({full, shard}, span, [&] { return collectives_.gather(full, shard); });
  }
  std::unique_ptr<Transfer> reduce_scatter(at::Tensor piece, at::Tensor full,
                                           std::shared_ptr<Span> span) override {
    return start({piece, full}, span, [&] { return collectives_.reduce_scatter(piece, full); });
  }
  std::unique_ptr<Transfer> start_all_reduce(at::Tensor tensor, Reduction reduction) override {
    return start({tensor}, nullptr, [&] { return collectives_.all_reduce(tensor, reduction); });
  }
  void all_reduce(at::Tensor tensor, Reduction reduction) override {
    start({tensor}, nullptr, [&] { return collectives_.all_reduce(tensor, reduction); })->wait();
  }
  void broadcast(at::Tensor tensor) override {
    start({tensor}, nullptr, [&] { return collectives_.broadcast(tensor); })->wait();
  }
  void barrier() override {
    translated([&] {
      // A backend that works on the current stream hands nothing back to wait for.
      const c10::Device device = streams_->device();
      if (const Work work = collectives_.barrier(device)) work->wait();
      c10::impl::VirtualGuardImpl(device.type()).synchronizeStream(streams_->compute());
    });
  }
  bool in_order(int64_t) const override { return true; }

 private:
  template <typename Call>
  std::unique_ptr<Transfer> start(std::vector<at::Tensor> buffers,
                                  const std::shared_ptr<Span>& span, Call&& call) {
    // Order: whatever wrote the inputs, or last used the output's memory
    // (compute) -> collective (comm).
    streams_->comm_follows_compute();
    const c10::StreamGuard on_comm(streams_->comm());
    if (span) span->start(streams_->comm());
    // With asyncOp false the backend uses the current stream, ours. Waiting
    // then costs nothing, and orders our stream after backends that do not.
    if (const Work work = translated(call)) translated([&] { work->wait(); });
    if (span) span->stop(streams_->comm());
    return std::make_unique<StreamTransfer>(streams_, std::move(buffers),
                                            streams_->mark(streams_->comm()));
  }

  std::shared_ptr<const StreamPair> streams_;
  Collectives collectives_;
};

}  // namespace

C10dTransport make_c10d_transport(const std::string& group_name, int64_t rank, int64_t world,
                                  c10::Device device, milliseconds timeout) {
  Group group;
  std::string backend;
  try {
    group = c10d::resolve_process_group(group_name);
    backend = group->getBackend(device.type())->getBackendName();
  } catch (const c10::Error& error) {
    throw UserError("[runtime] process group \"" + group_name + "\" cannot serve device " +
                    device.str() + ": " + error.what_without_backtrace() +
                    ". Create it with a backend for that device.");
  }
  if (group->getRank() != rank || group->getSize() != world) {
    throw UserError("[runtime] process group \"" + group_name + "\" has rank " +
                    std::to_string(group->getRank()) + " of " + std::to_string(group->getSize()) +
                    ", the runtime was given rank " + std::to_string(rank) + " of " +
                    std::to_string(world) + ". Pass the group's own rank and size.");
  }
  if (device.is_cpu()) {
    return {std::make_unique<HostTransport>(std::move(group), timeout), nullptr};
  }
  if (backend == "gloo") {
    throw UserError("[runtime] process group \"" + group_name + "\" uses gloo for device " +
                    device.str() + ", which copies through the host. Use nccl.");
  }
  const auto streams = std::make_shared<const StreamPair>(device);
  return {std::make_unique<StreamTransport>(std::move(group), streams, timeout), streams};
}

}  // namespace deepcompile
