// SPDX-License-Identifier: Apache-2.0
#include "passes/registry.h"

#include <utility>

#include "base/error.h"
#include "passes/auto/plan.h"
#include "passes/coalesce.h"
#include "passes/offload_activation.h"
#include "passes/offload_adam_states.h"
#include "passes/order_link.h"
#include "passes/place_optimizer.h"
#include "passes/prefetch.h"
#include "passes/rematerialize.h"
#include "passes/selective_gather.h"
#include "passes/zero0_compile.h"
#include "passes/zero1_compile.h"
#include "passes/zero3_compile.h"

namespace deepcompile {
namespace {

class FunctionPass final : public Pass {
 public:
  FunctionPass(std::string name, Contract contract, PassFunction function, std::string summary)
      : name_(std::move(name)),
        contract_(std::move(contract)),
        function_(std::move(function)),
        summary_(std::move(summary)) {}

  std::string_view name() const override { return name_; }
  std::string_view summary() const override { return summary_; }
  Contract contract() const override { return contract_; }
  void run(StepProgram& program, PassContext& context) const override {
    function_(program, context);
  }

 private:
  std::string name_;
  Contract contract_;
  PassFunction function_;
  std::string summary_;
};

}  // namespace

std::unique_ptr<Pass> make_pass(std::string name, Contract contract, PassFunction function,
                                std::string summary) {
  DC_CHECK(function != nullptr, "a pass needs a function");
  return std::make_unique<FunctionPass>(std::move(name), std::move(contract), std::move(function),
                                        std::move(summary));
}

PassRegistry PassRegistry::with_builtins() {
  PassRegistry registry;
  registry.add(std::make_unique<Zero0Compile>());
  registry.add(std::make_unique<Zero1Compile>());
  registry.add(std::make_unique<Zero3Compile>());
  registry.add(std::make_unique<Rematerialize>());
  registry.add(std::make_unique<OffloadActivation>());
  registry.add(std::make_unique<OffloadAdamStates>());
  registry.add(std::make_unique<OffloadAdamStates>(OffloadAdamStatesOptions{.synchronous = true}));
  registry.add(std::make_unique<Prefetch>());
  registry.add(std::make_unique<SelectiveGather>());
  registry.add(std::make_unique<PlaceOptimizer>());
  registry.add(std::make_unique<OrderLink>());
  registry.add(std::make_unique<Coalesce>());
  registry.add(std::make_unique<AutoPlan>());
  return registry;
}

const Pass& PassRegistry::add(std::unique_ptr<Pass> pass) {
  const std::string name(pass->name());
  if (!is_name(name)) {
    throw UserError("[passes] '" + name +
                    "' is not a pass name. Use letters, digits and _ . : / -, and begin with a "
                    "letter, a digit or _.");
  }
  if (find(name) != nullptr) {
    throw UserError("[passes] " + name + ": a pass of this name exists. Choose another name.");
  }
  passes_.push_back(std::move(pass));
  return *passes_.back();
}

const Pass* PassRegistry::find(std::string_view name) const {
  for (const auto& pass : passes_) {
    if (pass->name() == name) return pass.get();
  }
  return nullptr;
}

const Pass& PassRegistry::get(std::string_view name) const {
  if (const Pass* pass = find(name)) return *pass;
  std::string known;
  for (const auto& pass : passes_) {
    known += (known.empty() ? "" : ", ") + std::string(pass->name());
  }
  throw UserError("[passes] " + std::string(name) +
                  ": there is no such pass. Known passes: " + known + ".");
}

std::vector<std::string> PassRegistry::names() const {
  std::vector<std::string> out;
  for (const auto& pass : passes_) out.emplace_back(pass->name());
  return out;
}

}  // namespace deepcompile
