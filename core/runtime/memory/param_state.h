// SPDX-License-Identifier: Apache-2.0
// One parameter's bytes on this rank: its shard, its full buffer while whole,
// its master copy, optimizer states and gradient.
//
// The flat buffer holds the members one behind another, padded with zeros to
// world * shard elements; rank r's shard is [r * shard, (r + 1) * shard). What
// a rank owns, and its optimizer updates, is that shard, or all of the buffer
// if the parameter is replicated.
//
// Callers: ParamStore moves the bytes, ShardedAdam updates them. Not
// thread-safe: the runtime holds its lock.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "ir/program.h"
#include "runtime/comm/transport.h"
#include "runtime/hyper.h"
#include "runtime/memory/member_slot.h"
#include "runtime/memory/row_set.h"

namespace deepcompile {

// Which piece of the flat buffer is meant, in elements.
struct Range {
  int64_t start = 0;
  int64_t stop = 0;
  int64_t size() const { return stop - start; }
};

struct MemberSpec {
  std::string name;
  at::Tensor parameter;  // the nn.Parameter, with its full values
  int64_t offset = 0;    // in the flat buffer, in elements
};

struct ParamSpec {
  std::string name;
  std::vector<MemberSpec> members;
  int64_t numel = 0;  // of the flat buffer, before padding to the world size
  Placement placement = Placement::kSharded;
  bool trainable = true;
};

struct Member {
  std::string name;
  int64_t offset = 0;
  int64_t numel = 0;
  MemberSlot slot;
  Hyper hyper;
  int64_t step = 0;       // updates it has had
  bool has_grad = false;  // some reduction of this step had a gradient for it
};

// A member's gradient on its way into the flat buffer.
using MemberGrads = std::map<size_t, at::Tensor>;  // by member index

enum class Presence {
  kShard,     // only the shard is valid
  kInFlight,  // a gather into the full buffer is under way
  kWhole,     // the full buffer is valid, and the members are bound to it
  kRows,      // the same of the rows that one micro batch reads; the others hold anything
};

// A reduction under way. `source` stays alive until it was waited for.
struct PendingReduction {
  std::unique_ptr<Transfer> transfer;
  at::Tensor source;
  at::Tensor piece;                     // this rank's sum
  at::Tensor value;                     // what is accumulated: the piece, or all if replicated
  std::shared_ptr<const RowSet> rows;   // set: `value` is all ranks' rows, not yet summed
  std::unique_ptr<Transfer> broadcast;  // of the pieces, if replicated and in order
  std::vector<size_t> members;
};

// An update whose gradient is complete, with all it needs to be applied now or
// later: settings and factors are those of the step it belongs to.
struct DueUpdate {
  at::Tensor gradient;  // over `owned_range`, times grad_scale
  double grad_scale = 1.0;
  double factor = 1.0;            // on a CPU: loss scale and clipping
  at::Tensor factor_tensor;       // on a device; undefined for 1
  std::vector<Hyper> hypers;      // by member
  std::vector<bool> outstanding;  // by member: has a gradient and is not updated yet
  bool changed = false;           // some member is updated
};

// Zeros for a shard of `numel` elements, or, if `in_place`, for a full buffer of
// all ranks' shards; undefined: any memory will do.
using ShardMemory = std::function<at::Tensor(const std::string& name, int64_t numel, bool in_place,
                                             c10::TensorOptions options)>;

class ParamState {
 public:
  // Copies this rank's piece out of the members' values and takes the members'
  // memory: at most one full copy of the parameter exists beside them, and none
  // if it is sharded. Throws UserError if the members do not fit together.
  ParamState(const ParamSpec& spec, int64_t rank, int64_t world, c10::Device device,
             const ShardMemory& memory);

  const std::string name;
  const Placement placement;
  const bool trainable;
  const int64_t rank;
  const int64_t world;
  std::vector<Member> members;

  int64_t shard_numel() const { return shard_numel_; }
  int64_t padded_numel() const { return world * shard_numel_; }
  c10::ScalarType dtype() const { return dtype_; }
  c10::ScalarType master_dtype() const;  // of all optimizer states
  c10::TensorOptions options() const;
  Range shard_range() const { return {rank * shard_numel_, (rank + 1) * shard_numel_}; }
  Range owned_range() const;
  // The part of a member inside this rank's owned range, in flat elements; may be empty.
  Range owned_range(const Member& member) const;

  bool is_written() const;  // some member is
  void forget_written();
  // What regions read is there.
  bool is_bound() const { return presence == Presence::kWhole || presence == Presence::kRows; }

  at::Tensor shard() const;   // weights, this rank's piece
  at::Tensor owned() const;   // weights, what the optimizer updates here
  at::Tensor master() const;  // f32 (f64 for f64 weights) values of `owned`; trainable only
  at::Tensor exp_avg();       // made, as zeros, when first asked for
  at::Tensor exp_avg_sq();

  void allocate_full();  // nothing if it is allocated
  bool has_full_memory() const { return full.defined() || full_place.defined(); }
  void bind_members();
  void drop_full();  // sharded parameters only
  // In an emergency: the full buffer of a sharded parameter that is whole goes
  // to the host, which no other rank notices, and comes back before it is read.
  int64_t send_full_away();  // bytes of device memory given back
  void bring_full_back();    // nothing if it is not away
  bool full_is_away() const { return away_.defined(); }
  void store_from_full();    // shard := the full buffer's values, and where they are new, master
  void store_from_master();  // owned weights := the master's values
  void drop_gradient();

  // Throws UserError on a gradient of another size, device or layout than its member's.
  void check_gradients(const MemberGrads& grads) const;
  // The gradients, which it checks, as one flat padded buffer of `reduce_dtype`:
  // the gradient's own memory where it already is that, else a copy.
  at::Tensor flat_gradient(const MemberGrads& grads, c10::ScalarType reduce_dtype) const;

  at::Tensor full;        // undefined while not allocated
  at::Tensor full_place;  // the memory of each full buffer; undefined: any
  Presence presence = Presence::kShard;
  std::unique_ptr<Transfer> gathering;
  std::optional<ComingRows> coming;  // set if that gather is by rows
  std::optional<PendingReduction> pending;
  // Gradient over `owned_range`, times grad_scale; undefined if there is none.
  at::Tensor gradient;
  double grad_scale = 1.0;
  bool gradient_is_wire = false;  // the reduction's own buffer: read-only, in the wire's type
  bool reduced_eagerly = false;   // some reduction of this step came from outside a plan

  // Sum of this rank's gradients over the whole padded buffer, in f32 (f64), of
  // the micro batches before the last; undefined if there is none.
  at::Tensor local_sum;
  std::vector<size_t> local_members;  // that have a gradient in it

  std::optional<DueUpdate> due;             // deferred, or being applied
  std::optional<std::vector<Hyper>> early;  // updated before its step, with these settings

  at::Tensor master_if_copied() const { return master_copy_; }
  const at::Tensor& exp_avg_if_made() const { return exp_avg_; }
  const at::Tensor& exp_avg_sq_if_made() const { return exp_avg_sq_; }
  at::Tensor shard_if_copied() const { return shard_; }
  // What can go to the host: master copy (if it is one), exp_avg, exp_avg_sq.
  std::array<at::Tensor*, 3> movable_states() { return {&master_copy_, &exp_avg_, &exp_avg_sq_}; }

 private:
  void check(const ParamSpec& spec) const;
  void copy_values(const ParamSpec& spec, const at::Tensor& to, Range range) const;

  c10::ScalarType dtype_;
  c10::Device device_;
  int64_t shard_numel_ = 0;
  at::Tensor away_;   // the full buffer's values on the host, while it is away
  at::Tensor shard_;  // undefined if the shard is a piece of the full buffer
  bool has_master_copy_ = false;
  at::Tensor master_copy_;  // undefined if the weights are their own master, or if it is away
  at::Tensor exp_avg_;
  at::Tensor exp_avg_sq_;
};

}  // namespace deepcompile
