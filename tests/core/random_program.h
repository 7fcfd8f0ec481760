// SPDX-License-Identifier: Apache-2.0
// Random valid compute-only programs: what a capture could hand over.
#pragma once

#include <cstdint>
#include <random>

#include "ir/program.h"

namespace deepcompile {

struct RandomProgramOptions {
  // All parameters replicated (stage 0), else a mix of sharded and whole.
  bool replicated = false;
};

// The same seed gives the same program on every machine. It has parameters of
// all types, some frozen and some packs; one to three graphs, each a chain of
// regions with skips, parameters shared between regions and graphs, saved
// values, dead values, values passed through, gradients made in parts; some that may not run
// twice; and an empty update section.
StepProgram random_program(uint32_t seed, const RandomProgramOptions& options = {});

// Uniform in [low, high]. (std::uniform_int_distribution differs between libraries.)
int64_t pick(std::mt19937& random, int64_t low, int64_t high);

}  // namespace deepcompile
