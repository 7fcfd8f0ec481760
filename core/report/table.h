// SPDX-License-Identifier: Apache-2.0
// A text table with aligned columns, for terminals.
#pragma once

#include <string>
#include <vector>

namespace deepcompile {

class Table {
 public:
  explicit Table(std::vector<std::string> header);

  // As many cells as the header has.
  void add(std::vector<std::string> cells);
  // Header, then rows; columns two spaces apart, no trailing spaces.
  std::string text() const;

 private:
  std::vector<std::vector<std::string>> rows_;  // the header first
};

}  // namespace deepcompile
