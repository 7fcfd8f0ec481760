// SPDX-License-Identifier: Apache-2.0
// JSON texts that are refused, and how the error says why.
#include <gtest/gtest.h>

#include <ctime>

#include "base/error.h"
#include "base/json_reader.h"
#include "test_support.h"

namespace deepcompile::base_json_test {
namespace {

std::string parsed(const std::string& text) {
  return error_of([&] { parse_json(text, "t.json"); });
}

std::string as_number(const std::string& text) {
  const nlohmann::json document = parse_json(text, "t.json");
  return error_of([&] { JsonReader(document, "t.json").number(); });
}

std::string repeated(const std::string& text, size_t times) {
  std::string out;
  for (size_t i = 0; i < times; ++i) out += text;
  return out;
}

TEST(Json, NodesAreShownShortly) {
  EXPECT_EQ(as_number("[1, 2]"), "t.json: must be a number, is an array.");
  EXPECT_EQ(as_number("{\"a\": [1]}"), "t.json: must be a number, is an object.");
  // 3 bytes a character: the cut is between two of them.
  EXPECT_EQ(as_number("\"" + repeated("\u20ac", 20) + "\""),
            "t.json: must be a number, is \"" + repeated("\u20ac", 12) + "....");
}

TEST(Json, TooDeepATextIsAnError) {
  EXPECT_EQ(parsed(repeated("[", 100) + repeated("]", 100)), "no error");
  const std::string why =
      ": arrays and objects are more than 100 deep in each other. Is it the right file?";
  EXPECT_EQ(parsed(repeated("[", 101) + repeated("]", 101)), "t.json: line 1, column 101" + why);
  EXPECT_EQ(parsed(repeated("[", 1'000'000)), "t.json: line 1, column 101" + why);
  EXPECT_EQ(parsed(repeated("{\"a\":", 1'000'000)), "t.json: line 1, column 501" + why);
}

TEST(Json, ErrorsNameThePlace) {
  EXPECT_EQ(parsed("{\"a\": 1,\n \"b\": 1e999}"),
            "t.json: line 2, column 7: this number is too large. Correct it.");
  EXPECT_EQ(parsed("-1e999"), "t.json: line 1, column 1: this number is too large. Correct it.");
  EXPECT_EQ(parsed("[1e999]"), "t.json: line 1, column 2: this number is too large. Correct it.");
  EXPECT_EQ(parsed("{\"a\": {\"b\": 1, \"c\": 2,\n\"b\": 3}}"),
            "t.json: line 2, column 1: the key \"b\" is there twice. Keep one of them.");
  EXPECT_EQ(parsed("{\"a\": {\"b\": 1}, \"b\": [{\"b\": 1}, {\"b\": 1}]}"), "no error");
  EXPECT_EQ(parsed("{\"a\": \u20ac}"),
            "t.json: line 1, column 7: not JSON at \"\u20ac\". Correct the syntax there.");
  EXPECT_EQ(parsed(""),
            "t.json: line 1, column 1: the JSON text ends too early. Is the file "
            "complete?");
}

// The parser's own callbacks take seconds for this.
TEST(Json, LongArraysTakeTimeByTheirLength) {
  const std::string text = "[" + repeated("{\"a\": [1]},", kSanitized ? 4'000 : 40'000) + "1]";
  const std::clock_t start = std::clock();
  EXPECT_EQ(parsed(text), "no error");
  EXPECT_LT(std::clock() - start, CLOCKS_PER_SEC / 2);
}

}  // namespace
}  // namespace deepcompile::base_json_test
