// SPDX-License-Identifier: Apache-2.0
#include "report/next_best.h"

#include <algorithm>
#include <functional>
#include <map>
#include <set>
#include <utility>
#include <variant>

#include "base/error.h"
#include "base/lists.h"
#include "ir/text.h"
#include "passes/auto/memory_menu.h"
#include "passes/auto/plan.h"
#include "passes/auto/read_choice.h"

namespace deepcompile {
namespace {

std::string signed_text(Nanos time) {
  return time < Nanos{0} ? "-" + pretty(Nanos{-time.value}) : "+" + pretty(time);
}
std::string signed_text(Bytes bytes) {
  return bytes < Bytes{0} ? "-" + pretty(Bytes{-bytes.value}) : "+" + pretty(bytes);
}

// One question, and all objects that it would be asked about.
struct Question {
  std::vector<std::string> objects;
  std::string chosen, instead;
  std::function<void(AutoChoice&)> edit;  // for the first object
};

class Asker {
 public:
  Asker(const StepProgram& plain, const StepProgram& plan, const PassEnvironment& environment)
      : builder_(plain, environment),
        program_(builder_.classical()),
        menu_(program_, *environment.estimator),
        choice_(read_choice(builder_, plan)),
        base_(builder_.measure(choice_)),
        room_(builder_.budget() - memory_peak(plan)) {}

  std::vector<Alternative> ask() {
    describe_params();
    ask_gaps();
    ask_states();
    ask_regions();
    ask_values();
    ask_places();
    std::vector<Alternative> out;
    for (const std::string& key : order_) out.push_back(answer(questions_.at(key)));
    return out;
  }

 private:
  Alternative answer(const Question& question) {
    AutoChoice choice = choice_;
    question.edit(choice);
    const Trial trial = builder_.measure(choice);
    const Bytes peak = trial.peak - base_.peak;
    return {question.objects,
            question.chosen,
            question.instead,
            trial.time - base_.time,
            peak,
            trial.fits || peak <= room_};
  }

  // Questions with one key are one.
  void add(const std::string& kind, const std::string& object, std::string chosen,
           std::string instead, std::function<void(AutoChoice&)> edit) {
    const std::string key = kind + "|" + chosen + "|" + instead;
    const auto [at, is_new] = questions_.try_emplace(key);
    if (is_new) {
      at->second = {{}, std::move(chosen), std::move(instead), std::move(edit)};
      order_.push_back(key);
    }
    if (!object.empty() && !contains(at->second.objects, object))
      at->second.objects.push_back(object);
  }

  // Parameters are alike if their sizes are and equal regions use them.
  void describe_params() {
    kinds_.assign(program_.params.size(), "");
    std::vector<std::set<std::pair<uint32_t, size_t>>> uses(program_.params.size());
    for (const Region& region : program_.regions) {
      for (size_t i = 0; i < region.inputs.size(); ++i) {
        const auto* ref = std::get_if<ParamRef>(&region.inputs[i]);
        if (ref != nullptr) uses[index(ref->param)].emplace(region.code, i);
      }
    }
    for (size_t p = 0; p < kinds_.size(); ++p) {
      const Param& param = program_.params[p];
      kinds_[p] = "param " + std::string(to_string(param.dtype)) + " " +
                  std::to_string(param.numel) + " " + std::string(to_string(param.placement)) +
                  (param.trainable ? "" : " frozen");
      for (const auto& [code, input] : uses[p]) {
        kinds_[p] += " " + std::to_string(code) + "." + std::to_string(input);
      }
    }
  }

  const std::string& name(ParamId id) const { return program_.param(id).name; }

  void ask_gaps() {
    for (const Gap& gap : builder_.gaps(choice_)) {
      if (gap.saved <= Nanos{0}) continue;
      const std::string from = section_name(program_.sections[gap.release.section]);
      const std::string to = section_name(program_.sections[gap.gather.section]);
      const std::string way =
          (gap.wraps || from != to ? "from " + from + " to " + to : "in " + from) +
          (gap.wraps ? " of the next round" : "");
      const bool kept = contains(*choice_.keep, gap.id);
      add(kinds_[index(gap.id.param)], name(gap.id.param),
          kept ? "kept whole " + way : "released and gathered again " + way,
          kept ? "gathered again" : "kept whole",
          [id = gap.id](AutoChoice& choice) { flip(&*choice.keep, id); });
    }
  }

  void ask_states() {
    for (const Movable& each : menu_.states()) {
      const ParamId id{each.id};
      const bool away = contains(choice_.offload_states, id);
      add(kinds_[each.id], name(id),
          away ? "optimizer states on the host" : "optimizer states on the device",
          away ? "on the device" : "on the host",
          [id](AutoChoice& choice) { flip(&choice.offload_states, id); });
    }
  }

  std::string kind_of(RegionId id) const {
    return "region " + std::to_string(program_.region(id).code);
  }

  void ask_regions() {
    for (const RecomputeUnit& unit : menu_.recompute()) {
      for (RegionId id : unit.regions) {
        const bool again = contains(choice_.recompute, id);
        add(kind_of(id), program_.region(id).name,
            again ? "run again in the backward" : "outputs kept for the backward",
            again ? "outputs kept" : "run again", [this, id](AutoChoice& choice) {
              flip(&choice.recompute, id);
              for (ValueId value : program_.region(id).outputs) {
                std::erase(choice.offload_values, value);
              }
            });
      }
    }
  }

  void ask_values() {
    std::vector<std::pair<std::string, std::string>> maker(program_.values.size());
    for (size_t r = 0; r < program_.regions.size(); ++r) {
      const Region& region = program_.regions[r];
      for (size_t o = 0; o < region.outputs.size(); ++o) {
        maker[index(region.outputs[o])] = {
            kind_of(RegionId{static_cast<uint32_t>(r)}) + " output " + std::to_string(o),
            region.name};
      }
    }
    for (const Movable& each : menu_.values(choice_.recompute)) {
      const ValueId id{each.id};
      const bool away = contains(choice_.offload_values, id);
      const auto& [kind, region] = maker[each.id];
      add(kind, region,
          "output of " + pretty(each.bytes) + (away ? " on the host" : " on the device") +
              " until the backward",
          away ? "on the device" : "on the host",
          [id](AutoChoice& choice) { flip(&choice.offload_values, id); });
    }
  }

  void ask_places() {
    const bool whole = program_.find_section(SectionKind::kUpdate, 0).has_value();
    if (!whole) return;
    for (const Place place : {Place::kStep, Place::kNextForward, Place::kBackward}) {
      if (place == choice_.place) continue;
      if (place == Place::kBackward && !builder_.early_updates()) continue;
      add("step", "", "updates in " + std::string(to_string(choice_.place)),
          "in " + std::string(to_string(place)),
          [place](AutoChoice& choice) { choice.place = place; });
    }
  }

  AutoBuilder builder_;
  const StepProgram& program_;
  MemoryMenu menu_;
  AutoChoice choice_;
  Trial base_;
  Bytes room_;                                 // of the plan as it is
  std::vector<std::string> kinds_;             // by parameter
  std::map<std::string, Question> questions_;  // by key
  std::vector<std::string> order_;             // of keys
};

bool by_auto(const StepProgram& plan) {
  return std::any_of(plan.reasons.begin(), plan.reasons.end(),
                     [](const Reason& reason) { return reason.pass == "auto"; });
}

// The same plan if backwards might update, which is the user's to allow: no one choice of the plan
// shows what others would follow from it.
std::optional<Alternative> with_early_updates(const StepProgram& plain, const StepProgram& plan,
                                              PassEnvironment environment) {
  const bool whole = plain.find_section(SectionKind::kUpdate, 0).has_value();
  if (environment.early_updates || plain.clip || !whole || !by_auto(plan)) return std::nullopt;
  environment.early_updates = true;
  environment.reasons = false;
  environment.held = nullptr;
  StepProgram other = plain;
  PassContext context(other, "auto", environment);
  try {
    AutoPlan().run(other, context);
  } catch (const UserError&) {
    return std::nullopt;  // above the budget
  }
  const SimSummary now = environment.simulate(plan), then = environment.simulate(other);
  return Alternative{{},
                     "no update in the backward (compile.early_updates is off)",
                     "planned with leave to update there",
                     then.time - now.time,
                     then.peak - now.peak};
}

}  // namespace

std::vector<Alternative> next_best(const StepProgram& plain, const StepProgram& plan,
                                   const PassEnvironment& environment) {
  if (environment.estimator == nullptr || environment.simulator == nullptr) {
    throw UserError(
        "[report] next_best: other choices are compared by simulation, and there is no machine. "
        "Give it one.");
  }
  const bool same =
      plain.params.size() == plan.params.size() && plain.values.size() == plan.values.size() &&
      plain.regions.size() == plan.regions.size() && plain.sections.size() == plan.sections.size();
  if (!same) {
    throw UserError(
        "[report] next_best: the plan was not made from this program. Give the compute-only "
        "program that its passes started from.");
  }
  std::vector<Alternative> out = Asker(plain, plan, environment).ask();
  if (auto early = with_early_updates(plain, plan, environment)) out.push_back(std::move(*early));
  return out;
}

std::string print(const Alternative& alternative) {
  return alternative.chosen + "; " + alternative.instead +
         " instead: " + signed_text(alternative.time) + ", " + signed_text(alternative.peak) +
         (alternative.fits ? "" : ", above the budget");
}

}  // namespace deepcompile
