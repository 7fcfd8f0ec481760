// SPDX-License-Identifier: Apache-2.0
// The storage of one nn.Parameter: bytes while its parameter is whole, none
// otherwise. The Parameter object, its shape and its autograd state stay.
//
// A slot swaps the memory under one StorageImpl, so the Parameter, its aliases
// and what autograd saved of it all see the same bytes, or none.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

namespace deepcompile {

// What a tensor's storage is, whatever bytes it has at present.
c10::StorageImpl* storage_of(const at::Tensor& tensor);

class MemberSlot {
 public:
  // Moves `parameter` onto a new, empty storage on `device`, contiguous. Its
  // values must have been read before.
  MemberSlot(std::string name, at::Tensor parameter, c10::Device device);

  // Points the storage at elements [offset, offset + numel) of `flat`, which
  // it keeps alive. Throws UserError as check_storage() does.
  void bind(const at::Tensor& flat, int64_t offset);
  // Takes the bytes away.
  void unbind();

  // Throws UserError if the Parameter was given other storage.
  void check_storage() const;
  // The optimizer changed the values: for autograd's check of what it saved, and
  // for is_written().
  void mark_updated();
  // Whether the values were changed in place since, by someone who told autograd;
  // until forget_written().
  bool is_written() const { return version() != version_; }
  void forget_written() { version_ = version(); }

  // The same storage without autograd: what regions get.
  const at::Tensor& tensor() const { return alias_; }
  int64_t numel() const { return alias_.numel(); }

 private:
  uint32_t version() const;

  std::string name_;
  at::Tensor parameter_;
  at::Tensor alias_;
  uint32_t version_ = 0;  // of the Parameter, as of the last update
};

}  // namespace deepcompile
