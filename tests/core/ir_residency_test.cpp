// SPDX-License-Identifier: Apache-2.0
// What the verifier says of plans that recompute, offload, defer and update early.
#include <gtest/gtest.h>

#include "ir/text.h"
#include "ir/verifier.h"
#include "plan/plan.h"
#include "test_support.h"

namespace deepcompile::ir_residency_test {
namespace {

// One layer; s is saved for the backward, r is too if `f2` is not run again.
std::string program(const std::string& forward, const std::string& backward,
                    const std::string& update, const std::string& header = "") {
  return "step one world=2 accumulation=2 " + header + " reduce=f32\n" + R"(
param w f32 128
param n f32 64 whole
value x 64B
value s 64B
value r 64B
value y 4B
value t 4B
value g.w 512B grad=w
value g.n 256B grad=n
region f1 code=0 once (x, w) -> (s)
region f2 code=1 checkpoint (s, n) -> (r, y)
region b code=2 (t, r, s, w) -> (g.w, g.n)
forward 0 (x) -> (y)
)" + forward +
         "end\nbackward 0 (t) -> ()\n" + backward + "end\nupdate\n" + update + "end\n";
}

const char kForward[] = "gather w\nwait w\nrun f1\nrun f2\nrelease w\n";
const char kBackward[] =
    "gather w\nwait w\nrun b\nrelease w\nreduce w (g.w)\nreduce n (g.n)\n"
    "accumulate w\naccumulate n\n";
const char kUpdate[] = "update w\nupdate n\ngather n\nwait n\n";

std::string complaint(const std::string& text) {
  return error_of([&] { verify_plan(parse_program(text)); });
}

void expect_complaint(const std::string& text, const std::string& part) {
  const std::string error = complaint(text);
  EXPECT_NE(error.find(part), std::string::npos) << error;
}

std::string with(std::string text, const std::string& after, const std::string& more) {
  return replaced(std::move(text), after, after + more);
}

TEST(Residency, TextAndPlanRoundTrip) {
  const std::string text =
      program(with(kForward, "run f2\n", "offload (s)\nevict (s)\noffload_states w\n"),
              with(kBackward, "wait w\n", "reload (s)\nawait (s)\n"), kUpdate, "boundary");
  const StepProgram parsed = parse_program(text);
  EXPECT_TRUE(parsed.boundary);
  EXPECT_TRUE(parsed.regions[0].once);
  EXPECT_TRUE(parsed.regions[1].checkpoint);
  const std::string printed = print(parsed);
  EXPECT_EQ(print(parse_program(printed)), printed);
  EXPECT_EQ(complaint(text), "no error");
  const Plan plan = freeze(parsed);
  EXPECT_EQ(parse_plan(serialize(plan)), plan);
}

TEST(Residency, RunsARegionAgainUnlessItMayRunOnceOnly) {
  EXPECT_EQ(complaint(program(kForward, with(kBackward, "wait w\n", "run f2\n"), kUpdate)),
            "no error");
  expect_complaint(program(kForward, with(kBackward, "wait w\n", "run f1\n"), kUpdate),
                   "draws random numbers");
}

TEST(Residency, ValuesMoveInOrder) {
  const auto forward = [](const std::string& more) {
    return program(with(kForward, "run f2\n", more), kBackward, kUpdate);
  };
  expect_complaint(forward("evict (s)\n"), "put `offload s` before it");
  expect_complaint(forward("offload (s)\noffload (s)\n"), "not on the device, at rest");
  expect_complaint(forward("offload (s)\nevict (s)\n"), "s is read and is not on the device");
  expect_complaint(forward("reload (s)\n"), "s is not on the host");
  expect_complaint(forward("offload (y)\n"), "y is the caller's too");
  expect_complaint(forward("offload ()\n"), "names no value");
  expect_complaint(program(with(kForward, "run f2\n", "offload (s)\n"), kBackward, kUpdate),
                   "the copy of s is never waited for");
  expect_complaint(program(with(kForward, "run f2\n", "offload (s)\nevict (s)\n"),
                           with(kBackward, "wait w\n", "reload (s)\n"), kUpdate),
                   "s is read and is not on the device");
  expect_complaint(program(with(kForward, "run f2\n", "offload (r)\nevict (r)\n"),
                           with(kBackward, "wait w\n", "run f2\n"), kUpdate),
                   "makes r again");
}

TEST(Residency, StatesAreThereForTheUpdate) {
  const auto update = [](const std::string& before) {
    return program(kForward, kBackward, before + kUpdate);
  };
  EXPECT_EQ(complaint(update("reload_states w\nawait_states w\n")), "no error");
  expect_complaint(update("reload_states w\n"), "Put `await_states w`");
  expect_complaint(update("offload_states w\n"), "states of w are not on the device");
  expect_complaint(update("offload_states w\nevict_states w\n"), "Put `reload_states and");
  expect_complaint(update("reload_states w\nevict_states w\n"), "not being copied out");
}

TEST(Residency, DeferredUpdatesComeBeforeTheNextUse) {
  const std::string update = "defer w\ndefer n\n";
  const std::string forward = with(kForward, "wait w\n", "gather n\nwait n\n");
  const std::string backward = with(kBackward, "wait w\n", "gather n\nwait n\n");
  EXPECT_EQ(complaint(program("update w\nupdate n\n" + forward, backward, update)), "no error");
  EXPECT_EQ(complaint(program(forward, backward, update)), "no error");  // by the gathers
  expect_complaint(program(kForward, backward, update), "uses n, which nothing in this section");
  expect_complaint(program(with(forward, "run f1\n", "update w\n"), backward, update),
                   "after a use of w");
  expect_complaint(program(forward, backward, "defer w\n"), "n is never updated");
  const std::string alone = R"(step alone world=2 accumulation=1 reduce=f32
param u f32 128
value t 4B
value g.u 512B grad=u
region f code=0 () -> ()
region b code=1 (t) -> (g.u)
forward 0 () -> ()
run f
end
backward 0 (t) -> ()
run b
reduce u (g.u)
accumulate u
end
update
defer u
end
)";
  expect_complaint(alone, "two steps' gradients would be added");
  EXPECT_EQ(complaint(replaced(alone, "run f\n", "update u\nrun f\n")), "no error");
  expect_complaint(program(forward, backward, "norm\ndefer w\nupdate w\ndefer n\n", "clip"),
                   "w is updated already");
  expect_complaint(program(forward, backward, "defer w\nnorm\ndefer n\n", "clip"), "no norm");
}

TEST(Residency, EarlyUpdatesComeLast) {
  const auto backward = [](const std::string& where, const std::string& header = "") {
    return program(kForward, with(kBackward, where, "update w\n"), kUpdate, header);
  };
  EXPECT_EQ(complaint(backward("accumulate w\n")), "no error");
  expect_complaint(backward("reduce w (g.w)\n"), "not complete");
  expect_complaint(
      replaced(backward("accumulate w\n", "clip"), "update\nupdate w", "update\nnorm\nupdate w"),
      "the step clips, and the norm comes after");
}

}  // namespace
}  // namespace deepcompile::ir_residency_test
