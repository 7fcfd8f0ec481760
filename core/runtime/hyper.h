// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace deepcompile {

// What the user's optimizer settings come to for one parameter, this step.
struct Hyper {
  double lr = 0.0;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 0.0;
  bool decoupled = true;  // AdamW; false: Adam, whose decay is added to the gradient
};

}  // namespace deepcompile
