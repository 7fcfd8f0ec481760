// SPDX-License-Identifier: Apache-2.0
// Reads a JSON document with errors that name the place.
//
// A JsonReader is a node of the document and its path ("links.intra.bandwidth",
// "sections[2].kind"). Every accessor checks and throws a UserError of the form
//   [cost] machine.json: links.intra.bandwidth: must be greater than 0, is -5.
// Callers: machine descriptions and plans. A reader refers to its document,
// which must outlive it.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace deepcompile {

// Parses `text`, or throws UserError with line and column: also for a key that an object has
// twice, a number too large for a double, and too deep a text. `where` opens every message: stage
// and document, as in "[cost] machine.json".
nlohmann::json parse_json(std::string_view text, const std::string& where);

class JsonReader {
 public:
  JsonReader(const nlohmann::json& node, std::string where, std::string path = "")
      : node_(&node), where_(std::move(where)), path_(std::move(path)) {}

  // Objects. `at` throws if the key is missing, `only` if there is any other key.
  JsonReader at(const std::string& key) const;
  std::optional<JsonReader> find(const std::string& key) const;
  void only(std::initializer_list<std::string_view> keys) const;
  std::vector<std::string> keys() const;

  // Arrays.
  std::vector<JsonReader> elements() const;

  // Leaves. integer() is within [low, high].
  std::string string() const;
  bool boolean() const;
  double number() const;
  double positive() const;
  double not_negative() const;
  int64_t integer(int64_t low, int64_t high) const;

  const nlohmann::json& node() const { return *node_; }

  [[noreturn]] void fail(const std::string& message) const;

 private:
  void expect_object() const;

  const nlohmann::json* node_;
  std::string where_;
  std::string path_;
};

}  // namespace deepcompile
