// SPDX-License-Identifier: Apache-2.0
#include "passes/library.h"

#include <dlfcn.h>

#include <filesystem>
#include <optional>
#include <utility>

#include "base/error.h"
#include "base/json_reader.h"
#include "base/lists.h"
#include "ir/text.h"
#include "passes/library_abi.h"
#include "passes/price_list.h"
#include "passes/registry.h"

namespace deepcompile {
namespace {

struct Description {
  std::string name, summary;
  Contract contract;
};

std::vector<Fact> read_facts(const JsonReader& list) {
  std::vector<Fact> facts;
  for (const JsonReader& word : list.elements()) {
    const auto fact = parse_fact(word.string());
    if (!fact) word.fail("unknown fact " + word.string());
    facts.push_back(*fact);
  }
  return facts;
}

Description read_description(const char* text, const std::string& where) {
  const nlohmann::json document = parse_json(text == nullptr ? "" : text, where);
  const JsonReader root(document, where);
  Description result{root.at("name").string(), root.at("summary").string(), {}};
  result.contract.needs = read_facts(root.at("needs"));
  result.contract.provides = read_facts(root.at("provides"));
  result.contract.conflicts = read_facts(root.at("conflicts"));
  return result;
}

class LibraryPass final : public Pass {
 public:
  LibraryPass(const DeepcompilePassLibrary* library, uint32_t number, Description description,
              std::string path)
      : library_(library),
        number_(number),
        description_(std::move(description)),
        path_(std::move(path)) {}

  std::string_view name() const override { return description_.name; }
  std::string_view summary() const override { return description_.summary; }
  Contract contract() const override { return description_.contract; }

  void run(StepProgram& program, PassContext& context) const override {
    const std::string where = "[passes] " + description_.name + " (" + path_ + ")";
    char* raw = library_->run(number_, request(program, context.environment()).c_str());
    if (raw == nullptr) throw UserError(where + ": gave no answer. Is it out of memory?");
    const std::string text = raw;
    library_->free_text(raw);
    const nlohmann::json document = parse_json(text, where);
    const JsonReader answer(document, where);
    if (const auto error = answer.find("error")) throw UserError(where + ": " + error->string());
    StepProgram result = parse_program(answer.at("program").string(), where + " returned");
    check_tables(program, result, where);
    program = std::move(result);
  }

 private:
  static std::string request(const StepProgram& program, const PassEnvironment& environment) {
    nlohmann::json request{{"program", print(program)},
                           {"memory_budget", nullptr},
                           {"early_updates", environment.early_updates},
                           {"prices", nullptr}};
    if (environment.memory_budget) request["memory_budget"] = environment.memory_budget->value;
    if (environment.estimator != nullptr) {
      request["prices"] = PriceList(program, *environment.estimator).json();
    }
    return request.dump();
  }

  const DeepcompilePassLibrary* library_;
  uint32_t number_;
  Description description_;
  std::string path_;
};

}  // namespace

std::vector<std::unique_ptr<Pass>> load_pass_library(const std::string& path) {
  const std::string where = "[passes] library " + path;
  std::error_code ignored;
  const std::string full = std::filesystem::absolute(path, ignored).string();
  void* handle = dlopen(full.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    throw UserError(where + ": cannot be loaded (" + std::string(dlerror()) +
                    "). Give the shared library that the build made.");
  }
  const auto function =
      reinterpret_cast<DeepcompilePassLibraryFunction>(dlsym(handle, DEEPCOMPILE_PASS_SYMBOL));
  if (function == nullptr) {
    throw UserError(where +
                    ": exports no passes. Write DEEPCOMPILE_PASS(YourPass) in one of its sources.");
  }
  const DeepcompilePassLibrary* library = function();
  if (library->abi != DEEPCOMPILE_PASS_ABI) {
    throw UserError(where + ": was built for pass ABI " + std::to_string(library->abi) +
                    ", this is " + std::to_string(DEEPCOMPILE_PASS_ABI) +
                    ". Build it again with the headers of this version.");
  }
  std::vector<std::unique_ptr<Pass>> passes;
  std::vector<std::string> taken = PassRegistry::with_builtins().names();
  for (uint32_t i = 0; i < library->count; ++i) {
    Description description = read_description(library->describe(i), where);
    if (!is_name(description.name) || contains(taken, description.name)) {
      throw UserError(where + ": pass '" + description.name + "': " +
                      (is_name(description.name) ? "there is one of that name." : "is no name.") +
                      " Choose another name.");
    }
    taken.push_back(description.name);
    passes.push_back(std::make_unique<LibraryPass>(library, i, std::move(description), path));
  }
  return passes;
}

}  // namespace deepcompile
