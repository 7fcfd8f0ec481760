// SPDX-License-Identifier: Apache-2.0
#include "runtime/offload/value_mover.h"

#include <ATen/ops/empty_strided.h>

namespace deepcompile {
namespace {

using At = MovedValue::At;

uint32_t version_of(const at::Tensor& tensor) {
  return tensor.is_inference() ? 0
                               : tensor.unsafeGetTensorImpl()->version_counter().current_version();
}

int64_t numel_of(const MovedValue& moved) {
  int64_t numel = 1;
  for (const int64_t size : moved.sizes) numel *= size;
  return numel;
}

c10::ScalarType type_of(const MovedValue& moved) {
  return c10::typeMetaToScalarType(moved.options.dtype());
}

}  // namespace

ValueMover::ValueMover(HostLink& link)
    : link_(link), pool_(std::make_shared<HostPool>(!link.device().is_cpu())) {}

bool ValueMover::can_move(const RuntimeValue& value) const {
  if (!value.isTensor() || !value.toTensor().defined()) return false;
  const at::Tensor& tensor = value.toTensor();
  return tensor.layout() == c10::kStrided && tensor.device() == link_.device() &&
         tensor.numel() > 0 && !tensor.is_conj() && !tensor.is_neg() &&
         tensor.unsafeGetTensorImpl()->is_non_overlapping_and_dense_or_false();
}

void ValueMover::offload(Frame* frame, const std::vector<int32_t>& slots,
                         const std::shared_ptr<Span>& span) {
  for (const int32_t slot : slots) {
    const auto before = frame->moved.find(slot);
    if (before != frame->moved.end()) {
      if (before->second.at != At::kReturning) continue;
      await(frame, {slot});
    }
    if (!can_move(frame->at(slot))) continue;
    const at::Tensor& tensor = frame->at(slot).toTensor();
    MovedValue moved;
    moved.host = pool_->take(static_cast<int64_t>(tensor.nbytes()));
    moved.sizes = tensor.sizes().vec();
    moved.strides = tensor.strides().vec();
    moved.options = tensor.options().requires_grad(false);
    moved.version = version_of(tensor);
    const HostLink::Pairs pairs{
        {flat_memory(tensor), moved.host.flat(tensor.numel(), tensor.scalar_type())}};
    moved.copy = link_.out(pairs, span);
    frame->moved.emplace(slot, std::move(moved));
  }
}

void ValueMover::evict(Frame* frame, const std::vector<int32_t>& slots) {
  for (const int32_t slot : slots) {
    const auto found = frame->moved.find(slot);
    if (found == frame->moved.end() || found->second.at != At::kLeaving) continue;
    // Order: copy (out) -> reuse of the value's memory (compute).
    found->second.copy.wait();
    if (version_of(frame->at(slot).toTensor()) != found->second.version) {
      frame->moved.erase(found);  // written to meanwhile: the copy is stale
      continue;
    }
    frame->at(slot) = RuntimeValue();
    found->second.at = At::kHost;
  }
}

void ValueMover::reload(Frame* frame, const std::vector<int32_t>& slots,
                        const std::shared_ptr<Span>& span) {
  for (const int32_t slot : slots) {
    const auto found = frame->moved.find(slot);
    if (found == frame->moved.end() || found->second.at != At::kHost) continue;
    MovedValue& moved = found->second;
    moved.arriving = at::empty_strided(moved.sizes, moved.strides, moved.options);
    const HostLink::Pairs pairs{
        {moved.host.flat(numel_of(moved), type_of(moved)), flat_memory(moved.arriving)}};
    moved.copy = link_.in(pairs, span);
    moved.at = At::kReturning;
  }
}

void ValueMover::await(Frame* frame, const std::vector<int32_t>& slots) {
  for (const int32_t slot : slots) {
    const auto found = frame->moved.find(slot);
    if (found == frame->moved.end() || found->second.at != At::kReturning) continue;
    // Order: copy (in) -> use (compute), and -> the next copy out into the same
    // host buffer, which starts after compute.
    found->second.copy.wait();
    frame->at(slot) = std::move(found->second.arriving);
    frame->moved.erase(found);
  }
}

void ValueMover::fetch(Frame* frame, int32_t slot) {
  if (frame->moved.empty()) return;
  reload(frame, {slot}, nullptr);
  await(frame, {slot});
}

int64_t ValueMover::missing_bytes(const Frame& frame, int32_t slot) {
  const auto found = frame.moved.find(slot);
  if (found == frame.moved.end() || found->second.at != At::kHost) return 0;
  return numel_of(found->second) * static_cast<int64_t>(found->second.options.dtype().itemsize());
}

int64_t ValueMover::evict_now(Frame* frame, int32_t slot) {
  const RuntimeValue& value = frame->at(slot);
  if (!can_move(value)) return 0;
  // Of a copy under way only the end is missing.
  if (const auto found = frame->moved.find(slot); found != frame->moved.end()) {
    found->second.copy.finish();
  }
  const at::Tensor& tensor = value.toTensor();
  if (tensor.storage().use_count() != 1) return 0;  // another tensor has its memory
  const c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> watch(
      tensor.getIntrusivePtr());
  const auto bytes = static_cast<int64_t>(tensor.storage().nbytes());
  const std::vector<int32_t> slots{slot};
  offload(frame, slots, nullptr);
  evict(frame, slots);
  if (!frame->at(slot).isNone()) return 0;
  // Whether Python still holds the tensor shows only now: then nothing came free.
  at::Tensor alive(watch.lock());
  if (!alive.defined()) return bytes;
  frame->at(slot) = std::move(alive);
  frame->moved.erase(slot);
  return 0;
}

}  // namespace deepcompile
