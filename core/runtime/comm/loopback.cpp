// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/copy.h>

#include "base/error.h"
#include "runtime/comm/transport.h"

namespace deepcompile {
namespace {

class Done final : public Transfer {
 public:
  void wait() override {}
};

class LoopbackTransport final : public Transport {
 public:
  std::unique_ptr<Transfer> gather(at::Tensor full, at::Tensor shard,
                                   std::shared_ptr<Span> span) override {
    return copy(std::move(full), std::move(shard), std::move(span));
  }

  std::unique_ptr<Transfer> reduce_scatter(at::Tensor piece, at::Tensor full,
                                           std::shared_ptr<Span> span) override {
    return copy(std::move(piece), std::move(full), std::move(span));
  }

  std::unique_ptr<Transfer> start_all_reduce(at::Tensor, Reduction) override {
    return std::make_unique<Done>();
  }
  void all_reduce(at::Tensor, Reduction) override {}
  void broadcast(at::Tensor) override {}
  void barrier() override {}
  bool in_order(int64_t) const override { return true; }

 private:
  static std::unique_ptr<Transfer> copy(at::Tensor to, at::Tensor from,
                                        std::shared_ptr<Span> span) {
    DC_CHECK(to.numel() == from.numel(), "a loopback transfer has one rank");
    if (span) span->start(std::nullopt);
    if (to.data_ptr() != from.data_ptr()) to.copy_(from);
    if (span) span->stop(std::nullopt);
    return std::make_unique<Done>();
  }
};

}  // namespace

std::unique_ptr<Transport> make_loopback_transport() {
  return std::make_unique<LoopbackTransport>();
}

}  // namespace deepcompile
