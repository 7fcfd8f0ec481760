// SPDX-License-Identifier: Apache-2.0
// Edits of one section's instructions, collected first and made at once, so
// that positions stay those of the section as it was.
#pragma once

#include <algorithm>
#include <cstddef>
#include <utility>
#include <vector>

#include "ir/program.h"

namespace deepcompile {

using SectionInstrs = std::vector<std::vector<Instr>>;  // one list a section

inline Instr on_param(Op op, ParamId param) {
  return {op, param, std::nullopt, {}};
}

inline SectionInstrs instrs_of(const StepProgram& program) {
  SectionInstrs out;
  out.reserve(program.sections.size());
  for (const Section& section : program.sections) out.push_back(section.instrs);
  return out;
}

// As many lists as the program has sections.
inline void replace_instrs(SectionInstrs instrs, StepProgram* program) {
  for (size_t s = 0; s < instrs.size(); ++s) program->sections[s].instrs = std::move(instrs[s]);
}

inline size_t count_instrs(const StepProgram& program) {
  size_t count = 0;
  for (const Section& section : program.sections) count += section.instrs.size();
  return count;
}

class SectionEdit {
 public:
  explicit SectionEdit(const std::vector<Instr>& instrs)
      : instrs_(instrs), dropped_(instrs.size(), false) {}

  // Slot k is just before instruction k; one past the last is the end. What
  // goes to one slot stands there in the order of the calls.
  void insert(size_t slot, Instr instr) { inserted_.emplace_back(slot, std::move(instr)); }
  void drop(size_t at) { dropped_[at] = true; }
  bool dropped(size_t at) const { return dropped_[at]; }

  std::vector<Instr> apply() && {
    std::stable_sort(inserted_.begin(), inserted_.end(),
                     [](const auto& a, const auto& b) { return a.first < b.first; });
    std::vector<Instr> out;
    out.reserve(instrs_.size() + inserted_.size());
    size_t next = 0;
    for (size_t i = 0; i <= instrs_.size(); ++i) {
      for (; next < inserted_.size() && inserted_[next].first == i; ++next) {
        out.push_back(std::move(inserted_[next].second));
      }
      if (i < instrs_.size() && !dropped_[i]) out.push_back(instrs_[i]);
    }
    return out;
  }

 private:
  const std::vector<Instr>& instrs_;
  std::vector<bool> dropped_;
  std::vector<std::pair<size_t, Instr>> inserted_;
};

}  // namespace deepcompile
