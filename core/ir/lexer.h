// SPDX-License-Identifier: Apache-2.0
// Tokens of one line of a program's text. Used by the parser, and for what a name is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace deepcompile {

enum class TokenKind : uint8_t {
  kWord,
  kString,
  kOpen,
  kClose,
  kLeft,
  kRight,
  kComma,
  kEquals,
  kArrow,
  kEnd
};

struct Token {
  TokenKind kind = TokenKind::kEnd;
  std::string_view text;  // as written; a string's without its quotes, escapes still in place
  int column = 1;         // of its first character, from 1
};

// Where in a text an error is, and how to say so.
struct TextPlace {
  std::string_view source;
  int line = 1;
  int column = 1;
};
[[noreturn]] void fail_at(const TextPlace& place, const std::string& message);

bool is_word_start(char c);
// Length of the word at the front of `text`, whose first character begins one. A '-' that begins an
// arrow ends it.
size_t word_length(std::string_view text);

// Replaces *tokens by the tokens of `line`, closed by one kEnd token. Throws
// UserError at a character that begins no token and at an unclosed string.
void tokenize(std::string_view line, const TextPlace& place, std::vector<Token>* tokens);

// A string token's text with its escapes (\" \\ \n \r \t) replaced.
std::string unescape(const Token& token, const TextPlace& place);
// The inverse, with quotes.
std::string quote(std::string_view text);

}  // namespace deepcompile
