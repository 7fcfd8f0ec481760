// SPDX-License-Identifier: Apache-2.0
// What crosses between a host and a pass library: prices, programs, errors.
// (Loading real libraries is tested by tests/python/test_custom_pass.py.)
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>

#include "base/error.h"
#include "cost/cost_model.h"
#include "ir/text.h"
#include "passes/library.h"
#include "passes/price_list.h"
#include "sim/exported_passes.h"
#include "sim/simulator.h"
#include "unit_cost.h"

namespace deepcompile::passes_library_test {
namespace {

constexpr const char* kStep = R"(step s world=2 reduce=f32
param a f32 128
value x 64B
value loss 4B
value t 4B
value ga 512B grad=a
region f time=100ns (x, a) -> (loss)
region b time=200ns (t, x, a) -> (ga)
forward 0 (x) -> (loss)
  gather a
  wait a
  run f
  release a
end
backward 0 (t) -> ()
  gather a
  wait a
  run b
  release a
  reduce a (ga)
  accumulate a
end
update
  update a
end
)";

class Tells final : public Pass {
 public:
  std::string_view name() const override { return "tells"; }
  std::string_view summary() const override { return "tells what it knows"; }
  Contract contract() const override { return {.needs = {Fact::kGathersPlaced}}; }
  void run(StepProgram& program, PassContext& context) const override {
    const PassEnvironment& known = context.environment();
    if (known.simulator == nullptr) throw UserError("no machine");
    context.because(ParamId{0}, std::to_string(known.simulate(program).time.value));
  }
};

nlohmann::json answer(const nlohmann::json& request) {
  const DeepcompilePassLibrary* library = exported_passes();
  char* text = library->run(0, request.dump().c_str());
  nlohmann::json result = nlohmann::json::parse(text);
  library->free_text(text);
  return result;
}

TEST(PassLibrary, PricesComeBackAsTheyWere) {
  const StepProgram program = parse_program(kStep);
  UnitCost costs;
  costs.beside = {0.5, 0.75};
  const PriceList list(program, costs);
  const PriceList again(list.json(), "test");
  EXPECT_EQ(list.json(), again.json());
  EXPECT_EQ(again.host_beside(program), costs.beside);
  for (const Section& section : program.sections) {
    for (const Instr& instr : section.instrs) {
      EXPECT_EQ(again.duration(program, instr), costs.duration(program, instr));
    }
  }
  EXPECT_EQ(simulate(program, again).time, simulate(program, costs).time);
  EXPECT_EQ(simulate(program, again).peak, simulate(program, costs).peak);
}

TEST(PassLibrary, AProgramWithOtherTablesHasNoPrice) {
  const StepProgram program = parse_program(kStep);
  const PriceList list(program, UnitCost{});
  Instr instr;
  instr.op = Op::kGather;
  instr.param = ParamId{1};
  EXPECT_THROW(list.duration(program, instr), UserError);
  EXPECT_THROW(PriceList("{}", "test"), UserError);
}

TEST(PassLibrary, RequestsRunExportedPasses) {
  static const bool exported = export_pass(std::make_unique<Tells>());
  ASSERT_TRUE(exported);
  const DeepcompilePassLibrary* library = exported_passes();
  EXPECT_EQ(library->abi, uint32_t{DEEPCOMPILE_PASS_ABI});
  ASSERT_EQ(library->count, 1u);
  const nlohmann::json description = nlohmann::json::parse(library->describe(0));
  EXPECT_EQ(description["name"], "tells");
  EXPECT_EQ(description["needs"], nlohmann::json{"gathers_placed"});

  const StepProgram program = parse_program(kStep);
  const UnitCost costs;
  nlohmann::json request{{"program", print(program)},
                         {"memory_budget", nullptr},
                         {"early_updates", false},
                         {"prices", PriceList(program, costs).json()}};
  const StepProgram result = parse_program(answer(request)["program"].get<std::string>());
  ASSERT_EQ(result.reasons.size(), 1u);
  EXPECT_EQ(result.reasons[0].text, std::to_string(simulate(program, costs).time.value));

  request["prices"] = nullptr;
  EXPECT_EQ(answer(request)["error"], "no machine");
  request["program"] = "nonsense";
  EXPECT_TRUE(answer(request).contains("error"));
}

TEST(PassLibrary, WhatIsNoLibraryIsRefused) {
  EXPECT_THROW(load_pass_library("/no/such.so"), UserError);
}

}  // namespace
}  // namespace deepcompile::passes_library_test
