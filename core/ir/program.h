// SPDX-License-Identifier: Apache-2.0
// StepProgram: one training step as data.
//
// Four tables (parameters, values, regions, sections) and, in each section, a
// list of instructions. The capture makes a program of `run`s alone; passes
// insert and move everything else; a Plan freezes the result for the runtime.
// The unit a pass sees is a region, not an ATen node.
//
// Sections are the parts of a step that the user's code starts: the forward
// and the backward of each captured graph, and the update. Values live from
// the section that makes them to their last use, also across sections of one
// graph (saved activations).
//
// Callers: the capture builds (through the bindings), passes edit, analysis
// and simulator read. Not thread-safe. Ids are valid for one program only.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <variant>
#include <vector>

#include "base/ids.h"
#include "base/units.h"
#include "ir/dtype.h"
#include "ir/op.h"
#include "ir/value.h"

namespace deepcompile {

// Where the bytes of a parameter live between uses.
enum class Placement : uint8_t {
  kSharded,     // weights, master copy and optimizer states: one piece a rank (ZeRO-3)
  kWhole,       // weights whole on every rank; master copy and states sharded (ZeRO-1)
  kReplicated,  // everything whole on every rank (stage 0, data parallel)
};

// What is gathered, reduced and updated as one: a large parameter by itself,
// or many small ones packed into one flat buffer.
struct Param {
  std::string name;
  DType dtype = DType::kF32;
  int64_t numel = 0;  // elements of the flat buffer, before padding to the world size
  Placement placement = Placement::kSharded;
  bool trainable = true;
  std::vector<std::string> members;  // names of the nn.Parameters inside; never empty
};

// One call of a compiled piece of the graph. Equal regions share `code`.
struct Region {
  std::string name;
  uint32_t code = 0;            // which compiled function runs it
  std::vector<Operand> inputs;  // in call order
  std::vector<ValueId> outputs;
  Bytes workspace;  // scratch alive only while it runs
  Bytes moved;      // device memory traffic: inputs read plus outputs written
  int64_t flops = 0;
  std::optional<Nanos> time;  // measured; absent until it has run
  bool once = false;          // draws random numbers or writes to what it reads: never run again
  bool checkpoint = false;    // the user marked it for recomputation: a hint, not an order
};

struct Instr {
  Op op = Op::kRun;
  std::optional<ParamId> param;
  std::optional<RegionId> region;
  std::vector<ValueId> values;  // gradients, for reduce; what moves, for offload and its like

  bool operator==(const Instr&) const = default;
};

enum class SectionKind : uint8_t { kForward, kBackward, kInference, kUpdate };
inline constexpr int kSectionKindCount = 4;

struct Section {
  SectionKind kind = SectionKind::kForward;
  uint32_t graph = 0;  // which captured graph; 0 for the update
  std::vector<ValueId> inputs;
  std::vector<ValueId> outputs;
  std::vector<Instr> instrs;
};

// One reason for one choice, kept with the program and shown by the report.
struct Reason {
  std::string pass;
  std::string object;  // a parameter's or region's name, or "" for the whole step
  std::string text;
};

// More would take too long to simulate.
inline constexpr int64_t kMostAccumulation = 65536;

class StepProgram {
 public:
  std::string name = "step";
  int64_t world = 1;         // ranks that share the parameters
  int64_t accumulation = 1;  // forward/backward repeats before the update
  bool clip = false;         // the update needs the global norm first
  bool boundary = false;     // gradients are summed on their rank, whole, and reduced in the last
                             // micro batch alone (ZeRO-1); otherwise in each
  DType reduce_dtype = DType::kF32;  // element type on the wire of a reduction

  std::vector<Param> params;
  std::vector<Value> values;
  std::vector<Region> regions;
  std::vector<Section> sections;
  std::vector<Reason> reasons;

  // Names are unique over parameters and values together, and over regions.
  // Throw UserError if taken, if not a name (see is_name), or if a number or a
  // reference in the object is out of range. A Param without members gets one
  // of its own name.
  ParamId add_param(Param param);
  ValueId add_value(Value value);
  RegionId add_region(Region region);

  const Param& param(ParamId id) const { return params.at(index(id)); }
  const Value& value(ValueId id) const { return values.at(index(id)); }
  const Region& region(RegionId id) const { return regions.at(index(id)); }

  std::optional<ParamId> find_param(std::string_view name) const;
  std::optional<ValueId> find_value(std::string_view name) const;
  std::optional<RegionId> find_region(std::string_view name) const;
  // Lets a value number the rows that its graph reads of a parameter. Throws
  // UserError if the parameter has no such rows.
  void read_rows(ValueId id, RowsOf rows);
  // All parameters are exchanged whole again.
  void forget_rows();

  // What numbers the rows of P that a forward or backward exchanges: an input of
  // its graph's forward; nothing if the section exchanges all of P.
  std::optional<ValueId> rows_input(const Section& section, ParamId id) const;
  // Most rows of P that a micro batch reads on one rank, repeated ones counted
  // each time; 0 if every graph exchanges all of P.
  int64_t rows_read(ParamId id) const { return rows_[index(id)].count; }

  // Whether all ranks' rows, by a value of so many bytes on each, are no more elements than there
  // can be.
  bool can_exchange(Bytes numbers, RowsOf rows) const;

  // Position in `sections` of one graph's section; the update's graph is 0.
  std::optional<SectionId> find_section(SectionKind kind, uint32_t graph) const;

  // Bytes of P when whole: numel times the element size, padded so that every
  // rank's shard has the same number of elements (see shard_numel).
  Bytes full_bytes(ParamId id) const;
  // Bytes of one rank's shard of P's weights in P's dtype.
  Bytes shard_bytes(ParamId id) const;
  // What a gather of P moves between the ranks, and what a reduction of it does
  // (in reduce_dtype): bytes of a whole, be it of P or of the rows of all ranks.
  Bytes gather_bytes(ParamId id) const;
  Bytes reduce_bytes(ParamId id) const;

 private:
  // Lets a string_view be looked up without making a string of it.
  struct NameHash {
    using is_transparent = void;
    size_t operator()(std::string_view text) const { return std::hash<std::string_view>{}(text); }
  };
  template <typename T>
  using NameMap = std::unordered_map<std::string, T, NameHash, std::equal_to<>>;
  using TableEntry = std::variant<ParamId, ValueId>;
  struct RowsRead {
    int64_t count = 0;  // on one rank
    int64_t row = 0;    // elements of one
  };

  void check_operand_name(std::string_view what, const std::string& name) const;
  void check_param_ref(std::string_view what, const std::string& name, ParamRef ref) const;
  void check_rows(const std::string& name, Bytes numbers, RowsOf rows) const;
  int64_t exchanged(ParamId id) const;  // elements of a whole

  NameMap<TableEntry> operands_;
  NameMap<RegionId> region_names_;
  std::vector<RowsRead> rows_;  // by parameter
};

// Whether `text` is a name: [A-Za-z0-9_][A-Za-z0-9_.:/-]*.
bool is_name(std::string_view text);

std::string_view to_string(Placement placement);  // "sharded", "whole", "replicated"
std::optional<Placement> parse_placement(std::string_view word);
std::string_view to_string(SectionKind kind);  // "forward", "backward", "inference", "update"
std::optional<SectionKind> parse_section_kind(std::string_view word);

// Elements of one rank's shard: ceil(numel / world), rounded up so that every
// shard starts on a kShardAlignment boundary whatever the element type.
inline constexpr int64_t kShardAlignment = 64;  // elements: 128 bytes in bf16
int64_t shard_numel(int64_t numel, int64_t world);

}  // namespace deepcompile
