// SPDX-License-Identifier: Apache-2.0
#include "runtime/trace.h"

#include <chrono>

namespace deepcompile {
namespace {

// BACKEND_DEFAULT is the flag under which device events carry time.
void record(std::optional<c10::Event>* event, const c10::Stream& stream) {
  event->emplace(stream.device_type(), c10::EventFlag::BACKEND_DEFAULT);
  (*event)->record(stream);
}

int64_t nanos_between(const c10::Event& from, const c10::Event& to) {
  to.synchronize();
  return static_cast<int64_t>(from.elapsedTime(to) * 1e6);  // elapsedTime is in milliseconds
}

}  // namespace

int64_t steady_now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

void Span::start(const std::optional<c10::Stream>& stream) {
  if (stream) {
    record(&start_event_, *stream);
  } else {
    start_ns_ = steady_now_ns();
  }
}

void Span::stop(const std::optional<c10::Stream>& stream) {
  if (stream) {
    record(&stop_event_, *stream);
  } else {
    stop_ns_ = steady_now_ns();
  }
}

int64_t Span::elapsed_ns() const {
  if (start_event_ && stop_event_) return nanos_between(*start_event_, *stop_event_);
  return stop_ns_ - start_ns_;
}

void Tracer::set(bool on, const std::optional<c10::Stream>& stream) {
  on_ = on;
  if (!on) return;
  spans_.clear();
  zero_ns_ = steady_now_ns();
  zero_event_.reset();
  if (stream) record(&zero_event_, *stream);
}

std::shared_ptr<Span> Tracer::open(SpanId id) {
  if (!on_) return nullptr;
  return spans_.emplace_back(std::make_shared<Span>(id));
}

std::vector<TraceRecord> Tracer::records() const {
  std::vector<TraceRecord> records;
  for (const auto& span : spans_) {
    TraceRecord record{.id = span->id, .workspace_bytes = span->workspace_};
    if (zero_event_ && span->start_event_ && span->stop_event_) {
      record.start_ns = nanos_between(*zero_event_, *span->start_event_);
      record.stop_ns = nanos_between(*zero_event_, *span->stop_event_);
    } else if (span->start_ns_ >= 0 && span->stop_ns_ >= 0) {
      record.start_ns = span->start_ns_ - zero_ns_;
      record.stop_ns = span->stop_ns_ - zero_ns_;
    } else {
      continue;
    }
    records.push_back(record);
  }
  return records;
}

}  // namespace deepcompile
