// SPDX-License-Identifier: Apache-2.0
#include "base/json_reader.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <set>

#include "base/error.h"

namespace deepcompile {
namespace {

constexpr size_t kMostDepth = 100;  // of arrays and objects in each other
constexpr size_t kMostShown = 40;

// Where the character begins that this byte is of.
size_t character_start(std::string_view text, size_t at) {
  while (at > 0 && at < text.size() && (static_cast<unsigned char>(text[at]) & 0xc0) == 0x80) --at;
  return at;
}

std::string shown(const nlohmann::json& node) {
  if (node.is_array()) return "an array";
  if (node.is_object()) return "an object";
  std::string text = node.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  if (text.size() <= kMostShown) return text;
  return text.substr(0, character_start(text, kMostShown - 3)) + "...";
}

std::string line_and_column(std::string_view text, size_t offset) {
  offset = std::min(offset, text.size());
  std::string_view before = text.substr(0, offset);
  const auto line = 1 + std::count(before.begin(), before.end(), '\n');
  const size_t start = before.rfind('\n') == std::string_view::npos ? 0 : before.rfind('\n') + 1;
  return "line " + std::to_string(line) + ", column " + std::to_string(offset - start + 1);
}

// A text that says how far it has been read.
class WatchedText {
 public:
  using iterator_category = std::input_iterator_tag;
  using value_type = char;
  using difference_type = std::ptrdiff_t;
  using pointer = const char*;
  using reference = const char&;

  WatchedText(const char* at, const char** read) : at_(at), read_(read) {}
  reference operator*() const { return *at_; }
  WatchedText& operator++() {
    *read_ = ++at_;
    return *this;
  }
  bool operator!=(const WatchedText& other) const { return at_ != other.at_; }
  bool operator==(const WatchedText& other) const { return at_ == other.at_; }

 private:
  const char* at_;
  const char** read_;
};

// Refuses what nlohmann's parser takes: a key twice, of which the last counts, and any depth. (Its
// callbacks do it too, in time that grows with the square of an array.)
class Parse : public nlohmann::json_sax<nlohmann::json> {
 public:
  Parse(std::string_view text, const std::string& where)
      : text_(text), where_(where), read_(text.data()) {}

  nlohmann::json run() {
    const char* end = text_.data() + text_.size();
    nlohmann::json::sax_parse(WatchedText(text_.data(), &read_), WatchedText(end, &read_), this);
    try {
      return nlohmann::json::parse(text_);
    } catch (const nlohmann::json::parse_error& error) {
      const size_t offset = error.byte > 0 ? error.byte - 1 : 0;
      if (offset >= text_.size()) {
        fail(text_.size(), "the JSON text ends too early. Is the file complete?");
      }
      const size_t from = character_start(text_, offset);
      const size_t to = character_end(from);
      fail(from, "not JSON at " +
                     shown(nlohmann::json(std::string(text_.substr(from, to - from)))) +
                     ". Correct the syntax there.");
    } catch (const nlohmann::json::exception&) {
      const size_t last = text_.find_last_of("0123456789", offset() - 1);
      const size_t before = text_.find_last_not_of("0123456789+-.eE", last);
      fail(before == std::string_view::npos ? 0 : before + 1,
           "this number is too large. Correct it.");
    }
  }

  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  bool start_object(size_t) override { return open(); }
  bool start_array(size_t) override { return open(); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool key(string_t& key) override {
    if (!keys_.back().insert(key).second) {
      fail(text_.rfind('"', offset() - 2),
           "the key \"" + key + "\" is there twice. Keep one of them.");
    }
    return true;
  }
  bool parse_error(size_t, const std::string&, const nlohmann::json::exception&) override {
    return false;  // run() says what it is
  }

 private:
  [[noreturn]] void fail(size_t at, const std::string& message) const {
    throw UserError(where_ + ": " + line_and_column(text_, at) + ": " + message);
  }

  size_t offset() const { return static_cast<size_t>(read_ - text_.data()); }

  size_t character_end(size_t at) const {
    do {
      ++at;
    } while (at < text_.size() && character_start(text_, at) != at);
    return at;
  }

  bool open() {
    if (keys_.size() == kMostDepth) {
      fail(offset() - 1, "arrays and objects are more than " + std::to_string(kMostDepth) +
                             " deep in each other. Is it the right file?");
    }
    keys_.emplace_back();
    return true;
  }
  bool close() {
    keys_.pop_back();
    return true;
  }

  std::string_view text_;
  const std::string& where_;
  const char* read_;
  std::vector<std::set<std::string>> keys_;  // of what is open
};

}  // namespace

nlohmann::json parse_json(std::string_view text, const std::string& where) {
  return Parse(text, where).run();
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
