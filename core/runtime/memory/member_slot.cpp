// SPDX-License-Identifier: Apache-2.0
#include "runtime/memory/member_slot.h"

#include <ATen/ops/empty.h>

#include "base/error.h"

namespace deepcompile {
namespace {

void drop_storage(void* context) {
  delete static_cast<c10::Storage*>(context);
}

// c10 can make a storage throw where its bytes are asked for, but has no way back; an explicit
// instantiation may name the private flags, which are all that this sets.
template <bool c10::StorageImpl::*kRead, bool c10::StorageImpl::*kChecked>
struct NoBytes {
  friend void set_no_bytes(c10::StorageImpl& storage, bool none) {
    storage.*kRead = none;
    storage.*kChecked = none;
  }
};
void set_no_bytes(c10::StorageImpl& storage, bool none);
template struct NoBytes<&c10::StorageImpl::throw_on_immutable_data_ptr_,
                        &c10::StorageImpl::has_mutable_data_ptr_check_>;

}  // namespace

c10::StorageImpl* storage_of(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
}

MemberSlot::MemberSlot(std::string name, at::Tensor parameter, c10::Device device)
    : name_(std::move(name)), parameter_(std::move(parameter)) {
  const std::vector<int64_t> sizes = parameter_.sizes().vec();
  alias_ = at::empty({0}, parameter_.options().device(device).requires_grad(false));
  // Sizes alone, so that no bytes are allocated for them.
  alias_.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  parameter_.set_data(alias_);
  storage_of(alias_)->get_extra_meta().custom_data_ptr_error_msg_ =
      "[runtime] parameter " + name_ +
      " is sharded and has no memory here: read and change it inside GatheredParameters, or take "
      "engine.state_dict(). If the forward of a module reads it that does not own it, and is not "
      "compiled, name that module's class in zero_optimization.leaf_module.classes";
  unbind();
  forget_written();
}

void MemberSlot::check_storage() const {
  if (storage_of(parameter_) == storage_of(alias_)) return;
  throw UserError("[runtime] parameter " + name_ +
                  " was given other storage after initialize (an assignment to .data, or "
                  "module.to()). Change it in place, inside GatheredParameters.");
}

void MemberSlot::mark_updated() {
  if (!parameter_.is_inference()) parameter_.unsafeGetTensorImpl()->bump_version();
  forget_written();
}

uint32_t MemberSlot::version() const {
  if (parameter_.is_inference()) return 0;  // they have none
  return parameter_.unsafeGetTensorImpl()->version_counter().current_version();
}

void MemberSlot::bind(const at::Tensor& flat, int64_t offset) {
  check_storage();
  c10::StorageImpl* storage = storage_of(alias_);
  const int64_t item = alias_.element_size();
  char* bytes = static_cast<char*>(flat.data_ptr()) + offset * item;
  set_no_bytes(*storage, false);
  storage->set_data_ptr(
      c10::DataPtr(bytes, new c10::Storage(flat.storage()), &drop_storage, flat.device()));
  storage->set_nbytes(static_cast<size_t>(alias_.numel() * item));
}

void MemberSlot::unbind() {
  c10::StorageImpl* storage = storage_of(alias_);
  storage->set_data_ptr(c10::DataPtr(nullptr, alias_.device()));
  storage->set_nbytes(static_cast<size_t>(0));
  set_no_bytes(*storage, alias_.numel() != 0);
}

}  // namespace deepcompile
