// SPDX-License-Identifier: Apache-2.0
#include "sim/exported_passes.h"

#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/json_reader.h"
#include "ir/text.h"
#include "ir/verifier.h"
#include "passes/price_list.h"
#include "sim/simulator.h"

namespace deepcompile {
namespace {

struct Exported {
  std::unique_ptr<Pass> pass;
  std::string description;
};

std::vector<Exported>& table() {
  static std::vector<Exported> passes;
  return passes;
}

nlohmann::json words(const std::vector<Fact>& facts) {
  nlohmann::json list = nlohmann::json::array();
  for (Fact fact : facts) list.push_back(std::string(to_string(fact)));
  return list;
}

const char* describe(uint32_t number) {
  return table().at(number).description.c_str();
}

// A trial of a pass may be anything.
SimSummary simulate_valid(const StepProgram& program, const Estimator& estimator) {
  verify(program);
  return simulate_summary(program, estimator);
}

std::string run_request(uint32_t number, const char* text) {
  const Pass& pass = *table().at(number).pass;
  const nlohmann::json document = parse_json(text, "request");
  const JsonReader request(document, "request");
  StepProgram program = parse_program(request.at("program").string(), "request");
  PassEnvironment environment;
  environment.early_updates = request.at("early_updates").boolean();
  const auto budget = request.at("memory_budget");
  if (!budget.node().is_null()) environment.memory_budget = Bytes{budget.integer(1, INT64_MAX)};
  std::optional<PriceList> prices;
  if (const auto list = request.at("prices"); !list.node().is_null()) {
    prices.emplace(list.string(), "request");
    environment.estimator = &*prices;
    environment.simulator = simulate_valid;
  }
  PassContext context(program, std::string(pass.name()), environment);
  pass.run(program, context);
  try {
    verify(program);  // before it is printed, which takes ids and operands on trust
  } catch (const UserError& error) {
    throw UserError("left a program that is not valid: " + std::string(error.what()));
  }
  return nlohmann::json{{"program", print(program)}}.dump();
}

char* to_c(const std::string& text) {
  char* copy = static_cast<char*>(std::malloc(text.size() + 1));
  if (copy != nullptr) std::memcpy(copy, text.c_str(), text.size() + 1);
  return copy;
}

char* run(uint32_t number, const char* request) noexcept {
  const auto failed = [](const char* what) {
    // A message in an encoding of its own must not hide the failure.
    return to_c(nlohmann::json{{"error", what}}.dump(-1, ' ', false,
                                                     nlohmann::json::error_handler_t::replace));
  };
  try {
    return to_c(run_request(number, request));
  } catch (const std::exception& error) {
    return failed(error.what());
  } catch (...) {
    return failed("threw something that is no std::exception");
  }
}

void free_text(char* text) {
  std::free(text);
}

}  // namespace

bool export_pass(std::unique_ptr<Pass> pass) {
  const Contract contract = pass->contract();
  nlohmann::json text{{"name", std::string(pass->name())},
                      {"summary", std::string(pass->summary())},
                      {"needs", words(contract.needs)},
                      {"provides", words(contract.provides)},
                      {"conflicts", words(contract.conflicts)}};
  table().push_back({std::move(pass), text.dump()});
  return true;
}

const DeepcompilePassLibrary* exported_passes() {
  static const DeepcompilePassLibrary library{
      DEEPCOMPILE_PASS_ABI, static_cast<uint32_t>(table().size()), describe, run, free_text};
  return &library;
}

}  // namespace deepcompile
