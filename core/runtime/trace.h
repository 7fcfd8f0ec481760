// SPDX-License-Identifier: Apache-2.0
// When each instruction really ran.
//
// Off by default and free while off. On a CPU a span is two readings of the
// steady clock; on a device it is two timing events on the stream the work is
// on, read only when the records are asked for. A transfer's span is the time
// on the link: a CPU backend closes it from its own thread.
//
// Callers: the executor opens spans, transports close those of transfers.
#pragma once

#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

namespace deepcompile {

struct SpanId {
  int64_t plan = -1;
  int64_t section = -1;
  int64_t instr = -1;
};

class Span {
 public:
  explicit Span(SpanId id) : id(id) {}

  // With a stream: a timing event there; without: the steady clock, now.
  void start(const std::optional<c10::Stream>& stream);
  void stop(const std::optional<c10::Stream>& stream);
  bool started() const { return start_event_.has_value() || start_ns_ >= 0; }
  int64_t elapsed_ns() const;  // of a span that was stopped; on a device, waits for it
  void set_workspace(int64_t bytes) { workspace_ = bytes; }

  const SpanId id;

 private:
  friend class Tracer;
  std::atomic<int64_t> start_ns_{-1};
  std::atomic<int64_t> stop_ns_{-1};
  std::optional<c10::Event> start_event_;
  std::optional<c10::Event> stop_event_;
  int64_t workspace_ = -1;
};

struct TraceRecord {
  SpanId id;
  int64_t start_ns = 0;  // since tracing began
  int64_t stop_ns = 0;
  int64_t workspace_bytes = -1;  // most scratch of a `run`, in bytes; -1 if unknown
};

class Tracer {
 public:
  // Turning it on drops earlier records and sets the zero of the clock.
  void set(bool on, const std::optional<c10::Stream>& stream);
  bool on() const { return on_; }

  // Null while off.
  std::shared_ptr<Span> open(SpanId id);

  // Spans that have ended, in the order they were opened. On a device this
  // waits for the events; spans still open are left out.
  std::vector<TraceRecord> records() const;

 private:
  bool on_ = false;
  int64_t zero_ns_ = 0;
  std::optional<c10::Event> zero_event_;
  std::vector<std::shared_ptr<Span>> spans_;
};

int64_t steady_now_ns();

}  // namespace deepcompile
