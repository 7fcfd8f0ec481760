// SPDX-License-Identifier: Apache-2.0
#include "report/compare.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <utility>

#include "ir/text.h"
#include "report/table.h"

namespace deepcompile {
namespace {

using Key = std::pair<std::string, uint32_t>;

struct TimeSum {
  Nanos time;
  int64_t count = 0;

  void add(Nanos duration) {
    time += duration;
    ++count;
  }
  Nanos mean() const { return {time.value / count}; }
};

bool same_execution(const SimItem& a, const SimItem& b) {
  return a.section == b.section && a.instr == b.instr && a.micro_step == b.micro_step;
}

}  // namespace

std::optional<double> CompareRow::ratio() const {
  if (!predicted || !measured || predicted->value == 0) return std::nullopt;
  return static_cast<double>(measured->value) / static_cast<double>(predicted->value);
}

std::vector<CompareRow> compare(const StepProgram& program, const SimResult& predicted,
                                const PlanPrograms& plans, const std::vector<Record>& records) {
  std::map<Key, TimeSum> predictions, measurements;
  std::map<Key, std::string> labels;
  const SimItem* last = nullptr;
  for (const SimItem& item : predicted.items) {
    const Section& section = program.sections.at(item.section);
    TimeSum& sum = predictions[{section_name(section), item.instr}];
    const bool timed = item.resource != Resource::kNone;
    // All that one execution did is one sample.
    // A span of compute has in it what the instruction waited for.
    const bool waits = !timed || item.resource == Resource::kCompute;
    if (timed) sum.time += item.end - item.start;
    if (waits) sum.time += item.stall;
    if (last == nullptr || !same_execution(*last, item)) ++sum.count;
    last = &item;
  }
  const RecordNames names(plans);
  for (const Record& record : records) {
    const auto entry = names.find(record);
    const Key key{entry.section, record.instr};
    measurements[key].add(record.end - record.start);
    labels[key] = instr_label(*entry.program, *entry.instr);
  }

  std::vector<CompareRow> rows;
  for (const Section& section : program.sections) {
    for (size_t i = 0; i < section.instrs.size(); ++i) {
      const Key key{section_name(section), static_cast<uint32_t>(i)};
      CompareRow row{key.first, key.second, instr_label(program, section.instrs[i]), {}, {}};
      if (const auto found = predictions.find(key); found != predictions.end()) {
        row.predicted = found->second.mean();
        row.executions = found->second.count;
      }
      if (const auto found = measurements.find(key); found != measurements.end()) {
        row.measured = found->second.mean();
        row.samples = found->second.count;
        measurements.erase(found);
      }
      const Nanos longest =
          std::max(row.predicted.value_or(Nanos{0}), row.measured.value_or(Nanos{0}));
      if (longest > Nanos{0}) rows.push_back(std::move(row));
    }
  }
  for (const auto& [key, sum] : measurements) {
    rows.push_back({key.first, key.second, labels[key], {}, sum.mean(), sum.count, 0});
  }
  return rows;
}

std::vector<KindRow> compare_kinds(const std::vector<CompareRow>& rows) {
  std::vector<KindRow> kinds;
  for (int i = 0; i < kOpCount; ++i) {
    KindRow sum{std::string(traits(static_cast<Op>(i)).name), 0, 0, {}, {}};
    for (const CompareRow& row : rows) {
      if (row.label.substr(0, row.label.find(' ')) != sum.kind) continue;
      sum.executions += row.executions;
      sum.samples += row.samples;
      sum.predicted += row.predicted.value_or(Nanos{}) * row.executions;
      sum.measured += row.measured.value_or(Nanos{}) * row.samples;
    }
    if (sum.predicted > Nanos{0} || sum.measured > Nanos{0}) kinds.push_back(std::move(sum));
  }
  return kinds;
}

std::string kind_table(const std::vector<KindRow>& rows) {
  Table table({"kind", "predicted", "of", "measured", "of", "difference"});
  for (const KindRow& row : rows) {
    const Nanos more = row.measured - row.predicted;
    table.add({row.kind, pretty(row.predicted), std::to_string(row.executions),
               pretty(row.measured), std::to_string(row.samples),
               (more < Nanos{0} ? "-" : "+") + pretty(Nanos{std::abs(more.value)})});
  }
  return table.text();
}

std::string compare_table(const std::vector<CompareRow>& rows) {
  Table table({"section", "#", "instruction", "predicted", "measured", "ratio", "samples"});
  for (const CompareRow& row : rows) {
    char ratio[32] = "-";
    if (const auto value = row.ratio()) std::snprintf(ratio, sizeof(ratio), "%.2f", *value);
    table.add({row.section, std::to_string(row.instr), row.label,
               row.predicted ? pretty(*row.predicted) : "-",
               row.measured ? pretty(*row.measured) : "-", ratio, std::to_string(row.samples)});
  }
  return table.text();
}

}  // namespace deepcompile
