// SPDX-License-Identifier: Apache-2.0
#include "base/json_reader.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace deepcompile {
namespace {

std::string shown(const nlohmann::json& node) {
  std::string text = node.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  if (text.size() > 40) text = text.substr(0, 37) + "...";
  return text;
}

std::string line_and_column(std::string_view text, size_t offset) {
  offset = std::min(offset, text.size());
  std::string_view before = text.substr(0, offset);
  const auto line = 1 + std::count(before.begin(), before.end(), '\n');
  const size_t start = before.rfind('\n') == std::string_view::npos ? 0 : before.rfind('\n') + 1;
  return "line " + std::to_string(line) + ", column " + std::to_string(offset - start + 1);
}

}  // namespace

nlohmann::json parse_json(std::string_view text, const std::string& where) {
  try {
    return nlohmann::json::parse(text);
  } catch (const nlohmann::json::parse_error& error) {
    const size_t offset = error.byte > 0 ? error.byte - 1 : 0;
    if (offset >= text.size()) {
      throw UserError(where + ": " + line_and_column(text, text.size()) +
                      ": the JSON text ends too early. Is the file complete?");
    }
    throw UserError(where + ": " + line_and_column(text, offset) + ": not JSON at " +
                    shown(nlohmann::json(std::string(text.substr(offset, 1)))) +
                    ". Correct the syntax there.");
  }
}

void JsonReader::fail(const std::string& message) const {
  std::string text = where_ + ": ";
  if (!path_.empty()) text.append(path_).append(": ");
  throw UserError(text.append(message));
}

void JsonReader::expect_object() const {
  if (!node_->is_object()) fail("must be an object, is " + shown(*node_) + ".");
}

JsonReader JsonReader::at(const std::string& key) const {
  if (auto found = find(key)) return *found;
  fail("the key \"" + key + "\" is missing. Add it.");
}

std::optional<JsonReader> JsonReader::find(const std::string& key) const {
  expect_object();
  const auto found = node_->find(key);
  if (found == node_->end()) return std::nullopt;
  return JsonReader(*found, where_,
                    path_.empty() ? key : std::string(path_).append(".").append(key));
}

void JsonReader::only(std::initializer_list<std::string_view> keys) const {
  for (const std::string& key : this->keys()) {
    if (std::find(keys.begin(), keys.end(), key) != keys.end()) continue;
    std::string known;
    for (std::string_view name : keys) known += (known.empty() ? "" : ", ") + std::string(name);
    fail("unknown key \"" + key + "\". Known keys: " + known + ".");
  }
}

std::vector<std::string> JsonReader::keys() const {
  expect_object();
  std::vector<std::string> names;
  for (const auto& [key, unused] : node_->items()) names.push_back(key);
  return names;
}

std::vector<JsonReader> JsonReader::elements() const {
  if (!node_->is_array()) fail("must be an array, is " + shown(*node_) + ".");
  std::vector<JsonReader> readers;
  readers.reserve(node_->size());
  for (size_t i = 0; i < node_->size(); ++i) {
    readers.emplace_back((*node_)[i], where_, path_ + "[" + std::to_string(i) + "]");
  }
  return readers;
}

std::string JsonReader::string() const {
  if (!node_->is_string()) fail("must be a string, is " + shown(*node_) + ".");
  return node_->get<std::string>();
}

bool JsonReader::boolean() const {
  if (!node_->is_boolean()) fail("must be true or false, is " + shown(*node_) + ".");
  return node_->get<bool>();
}

double JsonReader::number() const {
  if (!node_->is_number()) fail("must be a number, is " + shown(*node_) + ".");
  const double value = node_->get<double>();
  if (!std::isfinite(value)) fail("must be a finite number.");
  return value;
}

double JsonReader::positive() const {
  const double value = number();
  if (value <= 0) fail("must be greater than 0, is " + shown(*node_) + ".");
  return value;
}

double JsonReader::not_negative() const {
  const double value = number();
  if (value < 0) fail("must not be negative, is " + shown(*node_) + ".");
  return value;
}

int64_t JsonReader::integer(int64_t low, int64_t high) const {
  // Unsigned numbers above the signed range would wrap in get<int64_t>.
  const bool wide =
      node_->is_number_unsigned() && node_->get<uint64_t>() > static_cast<uint64_t>(INT64_MAX);
  if (!node_->is_number_integer() || wide) {
    fail("must be a whole number, is " + shown(*node_) + ".");
  }
  const int64_t value = node_->get<int64_t>();
  if (value < low || value > high) {
    fail("must be from " + std::to_string(low) + " to " + std::to_string(high) + ", is " +
         std::to_string(value) + ".");
  }
  return value;
}

}  // namespace deepcompile
