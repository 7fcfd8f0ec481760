// SPDX-License-Identifier: Apache-2.0
// RowExchange: gathers and reductions of an embedding that move the rows which
// the ranks' micro batches read, and no others.
//
// Ranks first tell each other which rows: a RowSet, made once a micro batch and
// good for its gathers and its reduction. It has as many places on each rank,
// the most that any has; how many that is, ranks exchange on the host, which so
// waits for the other ranks' hosts, never for a device.
//
//   gather   each owner writes what it owns of every place's row, and zeros
//            elsewhere, and a reduce-scatter gives each rank its own places: a
//            sum of one value and zeros, exact in any order (-0 becomes 0)
//   reduce   an all-gather of the rows of each rank's gradient; the owner adds
//            those it owns in rank order, in f32 (f64), and rounds once
//
// Shards are pieces of the flat parameter, so that a row may lie on several
// ranks: each has its part.
//
// Callers: ParamStore. Its parameters are sharded, of one member [rows, row]
// at offset 0. Methods are collectives unless they say otherwise, and throw
// TransportError.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>

#include "runtime/comm/transport.h"
#include "runtime/memory/param_state.h"

namespace deepcompile {

class RowExchange {
 public:
  RowExchange(Transport& transport, int64_t rank, int64_t world);

  // What ranks exchange the number of their rows over: CPU tensors.
  void use_host_side(std::unique_ptr<Transport> host) { host_ = std::move(host); }
  bool has_host_side() const { return host_ != nullptr; }

  // Fills in what is missing of `set` from the numbers of this rank's rows, an
  // int64 tensor of any shape. Can be called again after an allocation failed.
  void meet(RowSet* set, const at::Tensor& numbers) const;

  // Starts to collect this rank's rows of the set.
  struct Gather {
    std::unique_ptr<Transfer> transfer;
    at::Tensor rows;  // [places, row], after the transfer
  };
  Gather start_gather(const ParamState& param, const RowSet& set, std::shared_ptr<Span> span) const;
  // Writes collected rows into the full buffer. Not a collective.
  void place(const ParamState& param, const RowSet& set, const at::Tensor& rows) const;

  // This rank's rows of a gradient of the parameter's shape (undefined: zeros), in
  // the wire's type; a row that is there twice is zeros the second time. No collective.
  at::Tensor rows_of(const ParamState& param, const RowSet& set, const at::Tensor& gradient,
                     c10::ScalarType wire) const;
  // This rank's shard of the sum of all ranks' rows [world, places, row], in their
  // type. Not a collective.
  at::Tensor sum(const ParamState& param, const RowSet& set, const at::Tensor& rows) const;

 private:
  Transport& transport_;
  std::unique_ptr<Transport> host_;
  int64_t rank_;
  int64_t world_;
};

}  // namespace deepcompile
