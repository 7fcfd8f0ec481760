// SPDX-License-Identifier: Apache-2.0
#include "analysis/memory_timeline.h"

#include <algorithm>
#include <array>
#include <limits>

#include "analysis/step_machine.h"
#include "base/error.h"

namespace deepcompile {
namespace {

// The second micro batch and those between it and the last are alike.
constexpr int64_t kDifferentMicroBatches = 3;
// A step that still differs from the one before it after this many never settles.
constexpr int kMostSteps = 4;

class Levels : public StepEvents {
 public:
  explicit Levels(const StepMachine& machine) {
    for (const ParamFootprint& of : machine.footprints()) {
      memory(MemoryPart::kWeights, of.weights.value);
      memory(MemoryPart::kMasters, of.master.value);
      memory(MemoryPart::kMoments, of.moments.value);
    }
  }

  void begin(size_t, size_t, int64_t) override { during_ = total_; }
  void memory(MemoryPart part, int64_t bytes) override {
    now_[static_cast<size_t>(part)] += bytes;
    total_ += bytes;
    during_ = std::max(during_, total_);
    if (total_ > peak_) risen();
  }
  void kernel(Op, const Instr&) override {}
  void transfer(Resource, Op, const Instr&) override {}
  void mark(TransferSlot) override {}
  void wait(TransferSlot) override {}
  void end() override {}

  void begin_step() {
    peak_ = std::numeric_limits<int64_t>::min();
    risen();
  }
  int64_t peak() const { return peak_; }

 protected:
  void risen() {
    peak_ = total_;
    at_peak_ = now_;
  }

  std::array<int64_t, kMemoryPartCount> now_{}, at_peak_{};
  int64_t total_ = 0;
  int64_t during_ = 0;  // since the instruction began
  int64_t peak_ = 0;    // since the step began
};

class Timeline final : public Levels {
 public:
  Timeline(const StepProgram& program, const StepMachine& machine) : Levels(machine) {
    for (size_t s = 0; s < program.sections.size(); ++s) {
      starts_.push_back(out_.points.size());
      for (size_t i = 0; i < program.sections[s].instrs.size(); ++i) {
        out_.points.push_back({static_cast<uint32_t>(s), static_cast<uint32_t>(i), {}, {}});
      }
    }
  }

  void begin_step() {
    Levels::begin_step();
    for (MemoryAt& point : out_.points) point.during = point.after = Bytes{};
    const MemoryParts parts = named(now_);
    out_.base = parts.weights + parts.masters + parts.moments;
    out_.peak_point = 0;
    recorded_peak_ = peak_;
  }

  void begin(size_t section, size_t instr, int64_t micro_batch) override {
    Levels::begin(section, instr, micro_batch);
    at_ = starts_[section] + instr;
  }

  void end() override {
    MemoryAt& point = out_.points[at_];
    point.during = std::max(point.during, Bytes{during_});
    point.after = std::max(point.after, Bytes{total_});
    if (peak_ > recorded_peak_ && during_ == peak_) out_.peak_point = at_;
    recorded_peak_ = peak_;
  }

  MemoryTimeline finish() {
    out_.peak = Bytes{peak_};
    out_.at_peak = named(at_peak_);
    return std::move(out_);
  }

 private:
  static MemoryParts named(const std::array<int64_t, kMemoryPartCount>& bytes) {
    const auto of = [&](MemoryPart part) { return Bytes{bytes[static_cast<size_t>(part)]}; };
    MemoryParts parts;
    parts.weights = of(MemoryPart::kWeights);
    parts.masters = of(MemoryPart::kMasters);
    parts.moments = of(MemoryPart::kMoments);
    parts.gathered = of(MemoryPart::kGathered);
    parts.reductions = of(MemoryPart::kReductions);
    parts.gradients = of(MemoryPart::kGradients);
    parts.values = of(MemoryPart::kValues);
    parts.workspace = of(MemoryPart::kWorkspace);
    return parts;
  }

  std::vector<size_t> starts_;  // by section: its first point
  size_t at_ = 0;
  int64_t recorded_peak_ = 0;
  MemoryTimeline out_;
};

// Steps until one ends as it began; that one is left in `levels`.
template <typename L>
void run_until_settled(const StepProgram& program, StepMachine& machine, L& levels) {
  const int64_t micro_batches = std::min(program.accumulation, kDifferentMicroBatches);
  for (int step = 0; step < kMostSteps; ++step) {
    levels.begin_step();
    machine.run(levels, micro_batches);
    if (machine.settled()) return;
  }
}

}  // namespace

MemoryTimeline memory_timeline(const StepProgram& program) {
  StepMachine machine(program);
  Timeline timeline(program, machine);
  run_until_settled(program, machine, timeline);
  return timeline.finish();
}

Bytes memory_peak(const StepProgram& program) {
  StepMachine machine(program);
  Levels levels(machine);
  run_until_settled(program, machine, levels);
  return Bytes{levels.peak()};
}

}  // namespace deepcompile
