// SPDX-License-Identifier: Apache-2.0
#include "runtime/comm/link_measure.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <array>

namespace deepcompile {
namespace {

void finish(c10::Device device) {
  if (device.is_cpu()) return;
  c10::impl::VirtualGuardImpl(device.type()).synchronizeDevice(device.index());
}

// `transfer(span)` starts one and waits for it on the current stream.
template <typename Transfer>
int64_t median_ns(c10::Device device, int64_t repeats, Transfer&& transfer) {
  std::vector<int64_t> times;
  for (int64_t i = 0; i <= repeats; ++i) {
    const auto span = std::make_shared<Span>(SpanId{});
    const int64_t start = steady_now_ns();
    transfer(span);
    finish(device);
    const int64_t ns = device.is_cpu() ? steady_now_ns() - start : span->elapsed_ns();
    if (i > 0) times.push_back(ns);  // the first one warms up
  }
  std::nth_element(times.begin(), times.begin() + repeats / 2, times.end());
  return std::max<int64_t>(times[static_cast<size_t>(repeats / 2)], 1);
}

constexpr int64_t kBeside = 3;  // copies of the whole in each direction, with both at once

// Each direction has a half of both buffers to itself.
std::array<int64_t, 2> both_ways_ns(HostLink& link, const at::Tensor& whole,
                                    const at::Tensor& host) {
  const int64_t half = whole.numel() / 2;
  const auto part = [&](const at::Tensor& of, int64_t at) { return of.narrow(0, at, half); };
  const HostLink::Pairs out(2 * kBeside, {part(whole, 0), part(host, 0)});
  const HostLink::Pairs in(2 * kBeside, {part(host, half), part(whole, half)});
  const auto to_host = std::make_shared<Span>(SpanId{});
  const auto to_device = std::make_shared<Span>(SpanId{});
  HostCopy leaving = link.out(out, to_host), coming = link.in(in, to_device);
  leaving.wait();
  coming.wait();
  finish(link.device());
  return {to_host->elapsed_ns(), to_device->elapsed_ns()};
}

// Times in place of which come those of the rank that took longest.
void take_slowest(Transport& transport, c10::Device device, const std::vector<int64_t*>& times) {
  std::vector<double> flat;
  for (const int64_t* ns : times) flat.push_back(static_cast<double>(*ns));
  const at::Tensor slowest = at::tensor(flat, c10::TensorOptions().dtype(c10::kDouble)).to(device);
  transport.all_reduce(slowest, Reduction::kMax);
  const at::Tensor host = slowest.cpu();
  const double* next = host.const_data_ptr<double>();
  for (int64_t* ns : times) *ns = static_cast<int64_t>(*next++);
}

}  // namespace

LinkMeasures measure_links(Transport& transport, HostLink& link, int64_t world,
                           c10::ScalarType reduce_dtype, const std::vector<int64_t>& bytes,
                           int64_t repeats) {
  LinkTimes times{{"gather", {}}, {"reduce", {}}, {"to_host", {}}, {"to_device", {}}};
  const c10::Device device = link.device();
  const auto options = c10::TensorOptions().device(device);
  const auto pool = std::make_shared<HostPool>(!device.is_cpu());
  const auto item = static_cast<int64_t>(c10::elementSize(reduce_dtype));
  const bool beside = !device.is_cpu() && !bytes.empty();
  const int64_t largest = beside ? *std::max_element(bytes.begin(), bytes.end()) : 0;
  std::array<int64_t, 2> alone{}, both{};  // to the host, to the device
  int64_t gathered = 0;
  for (const int64_t wanted : bytes) {
    const int64_t numel = std::max<int64_t>(1, wanted / item / world);
    const int64_t whole_bytes = numel * world * item;
    const at::Tensor whole = at::zeros({numel * world}, options.dtype(reduce_dtype));
    const at::Tensor piece = at::zeros({numel}, options.dtype(reduce_dtype));
    const auto add = [&](const char* what, int64_t size, const auto& transfer) {
      transport.barrier();
      times[what].emplace_back(size, median_ns(device, repeats, transfer));
    };
    if (world > 1) {
      // Real shards, where only those go the way of the parameters: up to their size.
      const at::Tensor sample = transport.sample_shard(numel * item);
      const at::Tensor shard = sample.defined() ? sample : piece.view(c10::kByte);
      const int64_t size = world * shard.numel();
      const at::Tensor into = whole.view(c10::kByte).narrow(0, 0, size);
      if (size > gathered) {
        add("gather", size, [&](const auto& span) { transport.gather(into, shard, span)->wait(); });
      }
      gathered = std::max(gathered, size);
      add("reduce", whole_bytes,
          [&](const auto& span) { transport.reduce_scatter(piece, whole, span)->wait(); });
    }
    const HostBuffer buffer = pool->take(whole_bytes);
    const at::Tensor host = buffer.flat(numel * world, reduce_dtype);
    add("to_host", whole_bytes, [&](const auto& span) { link.out({{whole, host}}, span).wait(); });
    add("to_device", whole_bytes, [&](const auto& span) { link.in({{host, whole}}, span).wait(); });
    if (wanted == largest) {
      transport.barrier();
      alone = {times["to_host"].back().second, times["to_device"].back().second};
      both = both_ways_ns(link, whole, host);
    }
    finish(device);
  }
  std::vector<int64_t*> all = {&alone[0], &alone[1], &both[0], &both[1]};
  for (auto& [what, list] : times) {
    for (auto& [size, ns] : list) all.push_back(&ns);
  }
  if (!bytes.empty()) take_slowest(transport, device, all);
  LinkMeasures measures{std::move(times), std::nullopt};
  if (beside) {
    measures.beside = host_beside({Nanos{alone[1] * kBeside}, Nanos{alone[0] * kBeside}},
                                  {Nanos{both[1]}, Nanos{both[0]}});
  }
  return measures;
}

}  // namespace deepcompile
