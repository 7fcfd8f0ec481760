// SPDX-License-Identifier: Apache-2.0
#include "runtime/exec/replays.h"

#include <ATen/ops/as_strided.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "runtime/memory/member_slot.h"

namespace deepcompile {
namespace {

using WeakStorage = c10::weak_intrusive_ptr<c10::StorageImpl>;

constexpr int64_t kMostBadSteps = 3;    // in a row, before a recording is given up
constexpr int64_t kMostRecordings = 4;  // that were given up, before none is made any more

bool is_tensor(const RuntimeValue& value) {
  return value.isTensor() && value.toTensor().defined();
}

WeakStorage weak_storage(const at::Tensor& tensor) {
  return WeakStorage(tensor.storage().getWeakStorageImpl());
}

bool same_number(const RuntimeValue& a, const RuntimeValue& b) {
  if (a.isTensor() || b.isTensor()) return !is_tensor(a) && !is_tensor(b);
  if (a.isNone() || b.isNone()) return a.isNone() == b.isNone();
  if (a.isBool() != b.isBool() || a.isInt() != b.isInt()) return false;
  return a.toScalar().equal(b.toScalar().toDouble());
}

}  // namespace

Replays::Replays(std::shared_ptr<RunRecorder> recorder, const std::string& no_recorder,
                 MemoryMeter& meter, c10::Device device)
    : recorder_(std::move(recorder)), meter_(meter), device_(device) {
  report_.on = recorder_ != nullptr;
  if (!report_.on) report_.why_not = no_recorder;
}

Replays::Origin Replays::origin_of(const RuntimeValue& input) {
  if (!is_tensor(input)) return {WeakStorage(c10::intrusive_ptr<c10::StorageImpl>())};
  return {weak_storage(input.toTensor()), input.toTensor().scalar_type()};
}

void Replays::begin_section(const LoadedPlan& loaded, size_t section, size_t open_calls,
                            bool may_record) {
  visit_ = nullptr;
  const SectionKind kind = loaded.plan.sections[section].kind;
  if (kind == SectionKind::kInference) return leave_step();
  if (!recorder_ || kind == SectionKind::kUpdate) return;
  loaded_ = &loaded;
  section_ = section;
  const Sighting now{loaded.id, section, open_calls};
  if (!in_step_) start_step(now, may_record);
  seen_.push_back(now);
  if (mode_ == Mode::kRecording) {
    recording_->visits.push_back(std::make_unique<Visit>(Visit{now, {}, {}}));
    visit_ = recording_->visits.back().get();
  } else if (mode_ == Mode::kReplaying) {
    const auto& visits = recording_->visits;
    const auto same_section = [&](const auto& visit) {
      return visit->of.plan == now.plan && visit->of.section == section;
    };
    if (next_ < visits.size() && visits[next_]->of == now) {
      visit_ = visits[next_++].get();
    } else if (std::any_of(visits.begin(), visits.end(), same_section)) {
      mode_ = Mode::kPlain;  // out of its turn: what it writes to may be in use
    }
  }
}

void Replays::start_step(const Sighting& first, bool may_record) {
  in_step_ = true;
  next_ = 0;
  missed_ = 0;
  mode_ = Mode::kPlain;
  if (recording_ && recording_->visits.front()->of == first) {
    mode_ = Mode::kReplaying;
  } else if (alike_ >= wanted_ && last_.front() == first) {
    if (!may_record) {
      if (!recording_) report_.why_not = "memory is short, or the step is traced";
      return;
    }
    drop();
    try {
      recording_ = std::make_unique<Recording>();
      recording_->pool = recorder_->begin();
      meter_.begin_step();
      mode_ = Mode::kRecording;
    } catch (const std::exception& error) {
      give_up(error.what());
    }
  }
}

void Replays::end_step() {
  visit_ = nullptr;
  if (!in_step_) return;
  if (mode_ == Mode::kRecording) finish_recording();
  if (mode_ == Mode::kReplaying) {
    bad_steps_ = missed_ > 0 ? bad_steps_ + 1 : 0;
    if (missed_ > 0) report_.moved = moved_.text();
    if (bad_steps_ == kMostBadSteps) {
      give_up("what runs read moves from step to step: " + report_.moved);
    }
  }
  alike_ = seen_ == last_ ? alike_ + 1 : 0;
  last_ = std::exchange(seen_, {});
  mode_ = Mode::kPlain;
  in_step_ = false;
}

// An evaluation amid a step: what it gathers and releases is not the plan's, and may not be there
// in the steps that replay this one.
void Replays::leave_step() {
  if (mode_ == Mode::kRecording) drop();
}

void Replays::release(const ParamState& param) {
  if (mode_ != Mode::kRecording || !param.full.defined()) return;
  const void* const buffer = storage_of(param.full);
  const auto is_its = [&](const auto& made) { return made.second._unsafe_get_target() == buffer; };
  if (std::any_of(recording_->made.begin(), recording_->made.end(), is_its)) drop();
}

void Replays::fail_section() {
  if (mode_ == Mode::kRecording) drop();
  mode_ = Mode::kPlain;
  visit_ = nullptr;
}

void Replays::finish_recording() {
  mode_ = Mode::kPlain;
  report_.bytes = recorder_->end();
  report_.peak_bytes = meter_.end_step();
  report_.runs = 0;
  for (const auto& visit : recording_->visits) {
    report_.runs += static_cast<int64_t>(visit->runs.size());
  }
  if (report_.runs == 0) return give_up("no run of the step can be recorded");
  if (find_lasting()) {
    drop();
    report_.why_not = "something stays past the step's end: the next one is recorded without it";
    return;
  }
  keep_places();
  recording_->made.clear();
  recording_->read.clear();
  recording_->known.clear();
  ++report_.recordings;
  report_.why_not.clear();
}

// Whether there are instructions, not known before, whose memory outlives the step: before its
// turn comes again, it may be another's.
bool Replays::find_lasting() {
  bool found = false;
  for (const auto& [maker, memory] : recording_->made) {
    if (memory.use_count() > 0) found = lasting_.insert(maker).second || found;
  }
  return found;
}

// A buffer that was there from its first run to the step's end is there in every step, until
// something beside the steps, an evaluation say, releases it: the next one lies where it lay.
void Replays::keep_places() {
  for (const auto& [param, first] : recording_->read) {
    if (!param->full.defined() || first._unsafe_get_target() != storage_of(param->full)) continue;
    param->full_place = param->full;
    recording_->placed.push_back(param);
  }
}

bool Replays::drop() {
  if (!recording_) return false;
  if (mode_ == Mode::kRecording) recorder_->end();
  for (ParamState* param : recording_->placed) param->full_place.reset();
  moved_ = {};
  recording_.reset();
  visit_ = nullptr;
  mode_ = Mode::kPlain;
  report_.runs = report_.bytes = report_.peak_bytes = alike_ = bad_steps_ = 0;
  return true;
}

void Replays::give_up(const std::string& why) {
  drop();
  report_.why_not = why;
  wanted_ *= 4;  // steps that are alike, before the next try
  if (++given_up_ < kMostRecordings) return;
  recorder_.reset();
  report_.on = false;
}

void Replays::forget(int64_t plan) {
  refused_.clear();
  std::erase_if(lasting_, [&](const Maker& maker) { return std::get<0>(maker) == plan; });
  const auto uses = [&](const auto& visit) { return visit->of.plan == plan; };
  const bool used =
      recording_ && std::any_of(recording_->visits.begin(), recording_->visits.end(), uses);
  if (used) drop();
}

// ---- a run

std::optional<Replays::Values> Replays::run(size_t instr, const std::vector<LoadedInput>& wanted,
                                            Values* inputs, int64_t* workspace) {
  if (visit_ == nullptr) return std::nullopt;
  if (mode_ == Mode::kRecording) {
    note_reads(wanted);
    if (!is_recordable(instr, wanted, *inputs)) return std::nullopt;
    return record(instr, wanted, inputs, workspace);
  }
  const auto found = visit_->runs.find(instr);
  if (found == visit_->runs.end()) return std::nullopt;
  if (!fits(instr, found->second, *inputs)) {
    ++missed_;
    ++report_.missed;
    return std::nullopt;
  }
  ++report_.replayed;
  *workspace = found->second.workspace;
  return launch(found->second, inputs);
}

bool Replays::is_recordable(size_t instr, const std::vector<LoadedInput>& wanted,
                            const Values& inputs) const {
  if (lasting_.count(maker_of(instr)) != 0) return false;
  const PlanSection& section = loaded_->plan.sections[section_];
  const PlanRegion& region = region_at(instr);
  if (region.once || refused_.count(loaded_->codes[region.code].get()) != 0) return false;
  const auto leaves = [&](int32_t slot) {
    return std::find(section.outputs.begin(), section.outputs.end(), slot) != section.outputs.end();
  };
  if (std::any_of(region.outputs.begin(), region.outputs.end(), leaves)) return false;
  int64_t outside = 0;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!is_tensor(inputs[i])) continue;
    const at::Tensor& tensor = inputs[i].toTensor();
    if (tensor.device() != device_) return false;
    if (has_its_place(wanted[i], tensor)) continue;
    if (!tensor.is_non_overlapping_and_dense()) return false;
    outside += static_cast<int64_t>(tensor.nbytes());
  }
  return outside <= kCopyLimit;
}

const PlanRegion& Replays::region_at(size_t instr) const {
  const PlanInstr& run = loaded_->plan.sections[section_].instrs[instr];
  return loaded_->plan.regions[static_cast<size_t>(run.region)];
}

void Replays::note_reads(const std::vector<LoadedInput>& wanted) {
  for (const LoadedInput& input : wanted) {
    if (input.param == nullptr) continue;
    recording_->read.try_emplace(input.param, weak_storage(input.param->full));
  }
}

bool Replays::has_its_place(const LoadedInput& wanted, const at::Tensor& tensor) const {
  return wanted.param != nullptr || recording_->known.count(storage_of(tensor)) != 0;
}

std::optional<Replays::Values> Replays::record(size_t instr, const std::vector<LoadedInput>& wanted,
                                               Values* inputs, int64_t* workspace) {
  const PlanRegion& region = region_at(instr);
  RegionCode& code = *loaded_->codes[region.code];
  Run run;
  Values places;  // the inputs, but not their memory: some of it goes while the code is recorded
  Places of_inputs;
  std::vector<Origin> origins;
  RunRecorder::Recorded recorded;
  try {
    for (size_t i = 0; i < inputs->size(); ++i) {
      RuntimeValue& input = (*inputs)[i];
      run.inputs.push_back(input_rule(wanted[i], &input));
      const bool kept = !is_tensor(input) || wanted[i].param || run.inputs[i].copied.defined();
      places.push_back(kept ? input : RuntimeValue(at_place(input.toTensor(), &of_inputs)));
      origins.push_back(origin_of(input));
    }
    recorder_->prepare();
    meter_.begin_run(*inputs);
    recorded = recorder_->record(code, std::exchange(*inputs, {}));
    *workspace = run.workspace = meter_.end_run(recorded.outputs);
    Places shared;
    for (const RuntimeValue& output : recorded.outputs) {
      run.outputs.push_back(output_rule(instr, output, origins, &shared));
    }
    run.recorded = std::move(recorded.run);
    run.recorded->launch();
  } catch (const std::exception& error) {
    // Nothing has run: the values of its inputs are where they were.
    if (inputs->empty()) *inputs = std::move(places);
    const bool no_memory = dynamic_cast<const c10::OutOfMemoryError*>(&error) != nullptr;
    if (no_memory) {
      give_up("there was no memory to record");
    } else {
      refused_.insert(&code);
      report_.refused = region.name + ": " + error.what();
      // What the inputs' memory may become has gone into the recording, though the code still
      // reads it, and may hand on a view of it. The next step is recorded knowing that.
      drop();
      alike_ = wanted_;
    }
    return std::nullopt;
  }
  visit_->runs.insert_or_assign(instr, std::move(run));
  return std::move(recorded.outputs);
}

Replays::Input Replays::input_rule(const LoadedInput& wanted, RuntimeValue* input) {
  Input rule;
  if (!is_tensor(*input)) {
    rule.number = *input;
    return rule;
  }
  const at::Tensor& tensor = input->toTensor();
  rule.is_tensor = true;
  rule.sizes = tensor.sizes().vec();
  rule.strides = tensor.strides().vec();
  if (has_its_place(wanted, tensor)) {
    rule.data = tensor.const_data_ptr();
    recording_->known.insert(storage_of(tensor));
  } else {
    rule.copied = memory_like(tensor);
    rule.copied.copy_(tensor);
    recording_->ours.insert(storage_of(rule.copied));
    *input = rule.copied;
  }
  return rule;
}

Replays::Output Replays::output_rule(size_t instr, const RuntimeValue& output,
                                     const std::vector<Origin>& inputs, Places* shared) {
  Output rule;
  if (!is_tensor(output)) {
    rule.value = output;
    return rule;
  }
  const at::Tensor& tensor = output.toTensor();
  if (tensor.device() != device_) {
    throw UserError("an output is on a " + tensor.device().str() + ", where nothing is recorded");
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (inputs[i].storage._unsafe_get_target() != storage_of(tensor)) continue;
    if (inputs[i].dtype != tensor.scalar_type()) {
      throw UserError("an output is one of its inputs, seen as another type");
    }
    rule.alias = static_cast<int32_t>(i);
    rule.sizes = tensor.sizes().vec();
    rule.strides = tensor.strides().vec();
    rule.offset = tensor.storage_offset();
    return rule;
  }
  rule.value = to_keep(tensor, shared);
  recording_->made.emplace_back(maker_of(instr), weak_storage(tensor));
  recording_->known.insert(storage_of(tensor));
  recording_->ours.insert(storage_of(tensor));
  return rule;
}

std::optional<MovedInput::How> Replays::Input::differs(const RuntimeValue& from) const {
  if (!is_tensor || !deepcompile::is_tensor(from)) {
    const bool same = !is_tensor && same_number(number, from);
    return same ? std::nullopt : std::optional(MovedInput::How::kNumber);
  }
  const at::Tensor& tensor = from.toTensor();
  if (tensor.sizes() != at::IntArrayRef(sizes)) return MovedInput::How::kShape;
  if (copied.defined()) return std::nullopt;
  if (tensor.const_data_ptr() != data) return MovedInput::How::kPlace;
  const bool same = tensor.strides() == at::IntArrayRef(strides);
  return same ? std::nullopt : std::optional(MovedInput::How::kShape);
}

bool Replays::fits(size_t instr, const Run& run, const Values& inputs) {
  moved_.see(&run, inputs);
  for (size_t i = 0; i < inputs.size(); ++i) {
    const auto how = run.inputs[i].differs(inputs[i]);
    if (!how) continue;
    if (missed_ == 0) moved_.watch(&run, i, *how, name_of(instr, i), inputs[i]);
    return false;
  }
  return true;
}

std::string Replays::name_of(size_t instr, size_t input) const {
  const PlanSection& section = loaded_->plan.sections[section_];
  const PlanOperand& operand = region_at(instr).inputs[input];
  const auto index = static_cast<size_t>(operand.index);
  const std::string what =
      operand.is_param
          ? "parameter " + loaded_->params[index]->members[static_cast<size_t>(operand.member)].name
          : "value " + loaded_->plan.values[index];
  return "run " + region_at(instr).name + " of " + std::string(to_string(section.kind)) + " " +
         std::to_string(section.graph) + " reads " + what;
}

Replays::Values Replays::launch(const Run& run, Values* inputs) {
  for (size_t i = 0; i < inputs->size(); ++i) {
    const at::Tensor& copied = run.inputs[i].copied;
    if (!copied.defined()) continue;
    copied.copy_((*inputs)[i].toTensor());
    (*inputs)[i] = copied;
  }
  run.recorded->launch();
  Values outputs;
  outputs.reserve(run.outputs.size());
  for (const Output& rule : run.outputs) {
    if (rule.alias < 0) {
      outputs.push_back(rule.value);
      continue;
    }
    const at::Tensor& base = (*inputs)[static_cast<size_t>(rule.alias)].toTensor();
    outputs.emplace_back(at::as_strided(base, rule.sizes, rule.strides, rule.offset));
  }
  inputs->clear();
  return outputs;
}

at::Tensor Replays::at_place(const at::Tensor& tensor, Places* shared) const {
  at::Tensor& memory = (*shared)[storage_of(tensor)];
  if (!memory.defined()) {
    const auto keep = [pool = recording_->pool](void*) {};
    memory = at::from_blob(tensor.storage().mutable_data(),
                           {static_cast<int64_t>(tensor.storage().nbytes())}, keep,
                           tensor.options().dtype(c10::kByte).requires_grad(false), device_);
  }
  const at::Tensor place = at::empty({0}, tensor.options().requires_grad(false));
  place.set_(memory.storage(), tensor.storage_offset(), tensor.sizes(), tensor.strides());
  return place;
}

at::Tensor Replays::to_keep(const at::Tensor& tensor, Places* shared) {
  const at::Tensor place = at_place(tensor, shared);
  recording_->ours.insert(storage_of(place));
  return place;
}

RuntimeValue Replays::for_caller(const RuntimeValue& output) const {
  if (visit_ == nullptr || !is_tensor(output)) return output;
  const at::Tensor& tensor = output.toTensor();
  return recording_->ours.count(storage_of(tensor)) == 0 ? output : RuntimeValue(tensor.clone());
}

at::Tensor Replays::memory_like(const at::Tensor& tensor) {
  const at::Tensor flat = recorder_->allocate(static_cast<int64_t>(tensor.nbytes()));
  return flat.view(tensor.scalar_type()).as_strided(tensor.sizes(), tensor.strides());
}

// ---- a gather

at::Tensor Replays::full_buffer(size_t instr, const ParamState& param) {
  if (visit_ == nullptr || param.world == 1 || param.full.defined()) return {};
  if (lasting_.count(maker_of(instr)) != 0) return {};
  if (mode_ == Mode::kReplaying) {
    const auto found = visit_->fulls.find(instr);
    return found == visit_->fulls.end() ? at::Tensor() : found->second;
  }
  try {
    const auto item = static_cast<int64_t>(c10::elementSize(param.dtype()));
    const at::Tensor full = recorder_->allocate(param.padded_numel() * item).view(param.dtype());
    Places alone;
    visit_->fulls.insert_or_assign(instr, to_keep(full, &alone));
    recording_->made.emplace_back(maker_of(instr), weak_storage(full));
    return full;
  } catch (const c10::OutOfMemoryError&) {
    give_up("there was no memory to record");
    return {};
  }
}

}  // namespace deepcompile
