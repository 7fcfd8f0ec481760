// SPDX-License-Identifier: Apache-2.0
#include "passes/pass.h"

namespace deepcompile {

void PassContext::because(ParamId param, std::string text) {
  if (!environment_.reasons) return;
  program_.reasons.push_back({pass_, program_.param(param).name, std::move(text)});
}

void PassContext::because(RegionId region, std::string text) {
  if (!environment_.reasons) return;
  program_.reasons.push_back({pass_, program_.region(region).name, std::move(text)});
}

void PassContext::because(std::string text) {
  if (!environment_.reasons) return;
  program_.reasons.push_back({pass_, "", std::move(text)});
}

}  // namespace deepcompile
