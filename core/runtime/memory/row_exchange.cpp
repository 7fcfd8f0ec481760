// SPDX-License-Identifier: Apache-2.0
#include "runtime/memory/row_exchange.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <vector>

#include "base/error.h"

namespace deepcompile {
namespace {

int64_t row_elements(const ParamState& param) {
  return param.members[0].numel / param.members[0].slot.tensor().size(0);
}

// A part of a row that a shard begins or ends with.
struct Edge {
  int64_t row;
  int64_t column;
  int64_t width;
  int64_t offset;  // in the shard
};

// The rows of one rank's shard: `count` whole ones from `first` on, which begin
// at `offset`, and at most two parts.
struct OwnedRows {
  int64_t row;  // elements of one
  int64_t first = 0;
  int64_t count = 0;
  int64_t offset = 0;
  std::vector<Edge> edges;

  explicit OwnedRows(const ParamState& param) : row(row_elements(param)) {
    const int64_t start = param.shard_range().start;
    const int64_t stop = std::min(param.shard_range().stop, param.members[0].numel);
    if (start >= stop) return;
    first = (start + row - 1) / row;
    count = std::max<int64_t>(0, stop / row - first);
    offset = first * row - start;
    const int64_t head = start / row, tail = (stop - 1) / row;
    const auto add = [&](int64_t number) {
      const int64_t from = std::max(start, number * row);
      const int64_t to = std::min(stop, (number + 1) * row);
      edges.push_back({number, from - number * row, to - from, from - start});
    };
    if (head < first) add(head);
    if (tail >= first + count) add(tail);
  }

  at::Tensor whole(const at::Tensor& shard) const {
    return shard.narrow(0, offset, count * row).view({count, row});
  }
  // Of places' numbers: which are whole here, and where; those that are not are at 0.
  at::Tensor is_whole(const at::Tensor& numbers) const {
    return numbers.ge(first).logical_and_(numbers.lt(first + count));
  }
  at::Tensor at(const at::Tensor& numbers) const { return numbers.sub(first).clamp_(0, count - 1); }
};

at::Tensor column(const at::Tensor& flags) {
  return flags.unsqueeze(1);
}

}  // namespace

RowExchange::RowExchange(Transport& transport, int64_t rank, int64_t world)
    : transport_(transport), rank_(rank), world_(world) {}

void RowExchange::meet(RowSet* set, const at::Tensor& numbers) const {
  if (set->numbers.defined()) return;
  if (set->places == 0) {
    DC_CHECK(has_host_side(), "plans by rows load only where ranks can exchange their sizes");
    at::Tensor most = at::full({1}, std::max<int64_t>(1, numbers.numel()), at::kLong);
    host_->all_reduce(most, Reduction::kMax);
    set->places = most.item<int64_t>();
  }
  const int64_t count = numbers.numel(), rest = set->places - count;
  at::Tensor mine = at::zeros({set->places}, numbers.options());
  if (count > 0) {
    const at::Tensor sorted = std::get<0>(numbers.reshape({-1}).sort());
    mine.narrow(0, 0, count).copy_(sorted);
    mine.narrow(0, count, rest).copy_(sorted.narrow(0, count - 1, 1).expand({rest}));
  }
  const at::Tensor all = at::empty({world_ * set->places}, mine.options());
  transport_.gather(all, mine, nullptr)->wait();
  set->numbers = all.view({world_, set->places});
}

RowExchange::Gather RowExchange::start_gather(const ParamState& param, const RowSet& set,
                                              std::shared_ptr<Span> span) const {
  const OwnedRows owned(param);
  const at::Tensor shard = param.shard();
  const at::Tensor numbers = set.numbers.view({-1});
  at::Tensor sent;
  if (owned.count > 0) {
    sent = owned.whole(shard).index_select(0, owned.at(numbers));
    sent.masked_fill_(column(owned.is_whole(numbers).logical_not_()), 0);
  } else {
    sent = at::zeros({numbers.numel(), owned.row}, shard.options());
  }
  for (const Edge& edge : owned.edges) {
    const at::Tensor to = sent.narrow(1, edge.column, edge.width);
    const at::Tensor part = shard.narrow(0, edge.offset, edge.width).unsqueeze(0);
    to.copy_(at::where(column(numbers.eq(edge.row)), part, to));
  }
  const at::Tensor rows = at::empty({set.places, owned.row}, shard.options());
  return {transport_.reduce_scatter(rows.view({-1}), sent.view({-1}), std::move(span)), rows};
}

void RowExchange::place(const ParamState& param, const RowSet& set, const at::Tensor& rows) const {
  const int64_t numel = param.members[0].numel;
  const at::Tensor table = param.full.narrow(0, 0, numel).view({-1, rows.size(1)});
  table.index_copy_(0, set.numbers.select(0, rank_), rows);
}

at::Tensor RowExchange::rows_of(const ParamState& param, const RowSet& set,
                                const at::Tensor& gradient, c10::ScalarType wire) const {
  const int64_t row = row_elements(param), places = set.places;
  const c10::TensorOptions options = param.options().dtype(wire);
  if (!gradient.defined()) return at::zeros({places, row}, options);
  const at::Tensor mine = set.numbers.select(0, rank_);
  at::Tensor rows = gradient.reshape({-1, row}).index_select(0, mine);
  const at::Tensor repeated = mine.narrow(0, 1, places - 1).eq(mine.narrow(0, 0, places - 1));
  rows.narrow(0, 1, places - 1).masked_fill_(column(repeated), 0);
  return rows.to(wire);
}

at::Tensor RowExchange::sum(const ParamState& param, const RowSet& set,
                            const at::Tensor& rows) const {
  const OwnedRows owned(param);
  const c10::ScalarType wide = rows.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor total = at::zeros({param.shard_numel()}, rows.options().dtype(wide));
  for (int64_t rank = 0; rank < world_; ++rank) {
    const at::Tensor numbers = set.numbers.select(0, rank);
    const at::Tensor theirs = rows.select(0, rank).to(wide);
    if (owned.count > 0) {
      // One place of a rank at most adds more than zeros to a row, in whatever order they come.
      const at::Tensor others = column(owned.is_whole(numbers).logical_not_());
      owned.whole(total).index_add_(0, owned.at(numbers), theirs.masked_fill(others, 0));
    }
    for (const Edge& edge : owned.edges) {
      const at::Tensor part = theirs.narrow(1, edge.column, edge.width);
      const at::Tensor other = column(numbers.ne(edge.row));
      total.narrow(0, edge.offset, edge.width).add_(part.masked_fill(other, 0).sum(0));
    }
  }
  return total.to(rows.scalar_type());
}

}  // namespace deepcompile
