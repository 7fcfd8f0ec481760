// SPDX-License-Identifier: Apache-2.0
// Plan: a step program frozen for the runtime.
//
// Names become indices, and each instruction says which values die after it,
// so that the executor walks arrays and decides nothing. A plan holds no times
// and no sizes: two programs that differ only in measured costs freeze to the
// same plan, with the same hash, on every rank.
//
// Callers: the engine freezes a program, ranks compare hashes, the runtime
// loads the text form. A Plan is a value; nothing in it refers to the program.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "ir/dtype.h"
#include "ir/op.h"
#include "ir/program.h"

namespace deepcompile {

// One input of a region: a value slot, or one member of a parameter.
struct PlanOperand {
  bool is_param = false;
  int32_t index = 0;   // into Plan::params if is_param, else into Plan::values
  int32_t member = 0;  // of the parameter; 0 for values

  bool operator==(const PlanOperand&) const = default;
};

struct PlanInstr {
  Op op = Op::kRun;
  int32_t param = -1;            // into Plan::params, or -1
  int32_t region = -1;           // into Plan::regions, or -1
  std::vector<int32_t> values;   // into Plan::values: the gradients of a reduce, or what moves
  std::vector<int32_t> members;  // of a reduce, beside `values`: which member each belongs to
  std::vector<int32_t> frees;    // value slots that nothing reads after this instruction
  // Of a gather or reduce by rows: the slot of the forward's input that numbers the rows; -1: of
  // all of the parameter. In a backward it only names them: its forward's gather has read it.
  int32_t rows = -1;

  bool operator==(const PlanInstr&) const = default;
};

struct PlanRegion {
  std::string name;
  uint32_t code = 0;  // which compiled function runs it
  bool once = false;  // as Region::once
  std::vector<PlanOperand> inputs;
  std::vector<int32_t> outputs;

  bool operator==(const PlanRegion&) const = default;
};

struct PlanSection {
  SectionKind kind = SectionKind::kForward;
  uint32_t graph = 0;
  std::vector<int32_t> inputs;
  std::vector<int32_t> outputs;  // never in `frees` of their section: the caller takes them
  std::vector<PlanInstr> instrs;

  bool operator==(const PlanSection&) const = default;
};

struct Plan {
  std::string name;
  int64_t world = 1;
  int64_t accumulation = 1;
  bool clip = false;
  bool boundary = false;
  DType reduce_dtype = DType::kF32;
  std::vector<std::string> params;
  std::vector<std::string> values;
  std::vector<PlanRegion> regions;
  std::vector<PlanSection> sections;
  std::string hash;  // 16 hexadecimal digits over all of the above

  bool operator==(const Plan&) const = default;
};

// Verifies the program, then freezes it. Throws UserError if it is not valid.
//
// Liveness: a value used by the backward of its graph survives the forward and
// is freed by its last use there. A gradient is freed by its `reduce`: whoever
// carries the reduction out keeps it alive until the transfer is done.
Plan freeze(const StepProgram& program);

// JSON text, one section, region or instruction a line. parse_plan(serialize(p)) == p.
std::string serialize(const Plan& plan);

// Throws UserError naming the place in the JSON text if it is malformed, if an
// index points nowhere, or if the hash is not that of the content.
Plan parse_plan(std::string_view text);

// 64-bit FNV-1a of the serialised content without the hash, as 16 hex digits.
std::string content_hash(const Plan& plan);

}  // namespace deepcompile
