// SPDX-License-Identifier: Apache-2.0
// ParamStore: every parameter of one engine, and the moves between shard and
// whole: gather, wait, release; and of gradients: reduce, accumulate.
//
// Every method that starts a transfer is a collective: all ranks call it for
// the same parameters in the same order. Methods throw TransportError when a
// transfer fails (the caller names rank and instruction) and UserError when
// they are called out of order.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/comm/piece_sum.h"
#include "runtime/comm/transport.h"
#include "runtime/memory/param_state.h"
#include "runtime/memory/row_exchange.h"

namespace deepcompile {

// Bytes this rank holds, by kind.
using BufferReport = std::map<std::string, int64_t>;

class ParamStore {
 public:
  // accumulation: reductions per parameter and step that the caller expects;
  // with one, a reduction's buffer is the gradient shard, without a copy.
  ParamStore(Transport& transport, int64_t rank, int64_t world, c10::Device device,
             c10::ScalarType reduce_dtype, int64_t accumulation);

  ParamState& add(const ParamSpec& spec);
  ParamState* find(std::string_view name);  // null if unknown
  ParamState& at(std::string_view name);    // UserError if unknown
  Member& member(const std::string& name);  // UserError if unknown
  const std::vector<std::unique_ptr<ParamState>>& params() const { return params_; }

  // Starts making P whole; nothing if it is, or is on its way.
  void gather(ParamState& param, std::shared_ptr<Span> span = nullptr);
  // As gather, of the rows of a set alone: P is then good for these. The set is
  // completed from `numbers`, this rank's rows, if it is not complete.
  void gather_rows(ParamState& param, const std::shared_ptr<RowSet>& set, const at::Tensor& numbers,
                   std::shared_ptr<Span> span);
  // P is whole, or its rows are there, and its members are bound, for the current
  // stream's next work.
  void wait(ParamState& param);
  // Gives the full buffer back. Nothing for parameters that are kept whole.
  void release(ParamState& param);

  // Starts the sum of P's gradients, and of its local sum, over ranks. Members
  // without one count as zeros.
  void reduce(ParamState& param, const MemberGrads& grads, std::shared_ptr<Span> span = nullptr);
  // The same if no rank's gradient has other rows than those of the set: only
  // they are sent. The sum is rounded once.
  void reduce_rows(ParamState& param, std::shared_ptr<const RowSet> set, const MemberGrads& grads,
                   std::shared_ptr<Span> span);
  // Adds P's gradients to its local sum: no transfer. The next reduction takes it.
  void add_locally(ParamState& param, const MemberGrads& grads);
  // Waits for the sum and adds it, as a mean over ranks, to P's gradient; in a batch of
  // waits that gradient is there once the batch is given.
  void accumulate(ParamState& param);
  // In an emergency: waits for P's sum, so that what it was made of can go.
  // The bytes of that; 0 if no sum is under way, or if it finds no memory itself.
  int64_t drop_reduced(ParamState& param);
  void zero_grad();

  // Throws UserError if a Parameter was given other storage.
  void check_storage() const;
  // The current stream's next work may change P's owned weights: nobody reads them.
  void before_change(ParamState& param);
  // The optimizer changed P's owned weights: what other ranks own is stale.
  void owned_changed(ParamState& param);

  // After a failed section: ends every transfer under way and drops reductions
  // that were not accumulated. `reachable` false: the peers are gone, do not wait.
  void abandon_transfers(bool reachable);

  RowExchange& rows() { return rows_; }

  BufferReport buffer_report() const;
  // Every tensor this rank holds on the device, those of one memory too; some undefined.
  void visit(const std::function<void(const at::Tensor&)>& visitor) const;

 private:
  void forget_gather(ParamState& param);  // that is under way
  at::Tensor reduction_source(ParamState& param, const MemberGrads& grads) const;
  void check_trainable(const ParamState& param) const;
  void check_reducible(const ParamState& param) const;
  // `read_now`: its sum is read by what the current stream is given next.
  void end_reduction(ParamState& param, PendingReduction* pending, bool read_now);
  bool becomes_gradient(const ParamState& param) const;
  bool added_by_transfer(ParamState& param);
  RunningTotal running_total(ParamState& param, const at::Tensor& sum) const;
  static void set_total(ParamState& param, const at::Tensor& total);
  void add_to_gradient(ParamState& param, const at::Tensor& sum);

  Transport& transport_;
  RowExchange rows_;
  int64_t rank_;
  int64_t world_;
  double mean_;  // a sum over ranks times this
  c10::Device device_;
  c10::ScalarType reduce_dtype_;
  int64_t accumulation_;
  PieceSum totals_;
  std::vector<std::unique_ptr<ParamState>> params_;
  std::map<std::string, ParamState*, std::less<>> by_name_;
  std::map<std::string, std::pair<ParamState*, size_t>> members_;
};

}  // namespace deepcompile
