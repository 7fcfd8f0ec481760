// SPDX-License-Identifier: Apache-2.0
#include "ir/lexer.h"

#include "base/error.h"

namespace deepcompile {
namespace {

// Length of the string at the front of `text` with its quotes, 0 if unclosed.
size_t string_length(std::string_view text) {
  for (size_t n = 1; n < text.size(); ++n) {
    if (text[n] == '\\') {
      ++n;
    } else if (text[n] == '"') {
      return n + 1;
    }
  }
  return 0;
}

TokenKind punctuation(char c) {
  switch (c) {
    case '(':
      return TokenKind::kOpen;
    case ')':
      return TokenKind::kClose;
    case '[':
      return TokenKind::kLeft;
    case ']':
      return TokenKind::kRight;
    case ',':
      return TokenKind::kComma;
    case '=':
      return TokenKind::kEquals;
    default:
      return TokenKind::kEnd;
  }
}

std::string show_char(char c) {
  const auto byte = static_cast<unsigned char>(c);
  if (byte >= 0x20 && byte < 0x7f) return std::string("'") + c + "'";
  constexpr char kHex[] = "0123456789abcdef";
  return std::string("byte 0x") + kHex[byte >> 4] + kHex[byte & 15];
}

// A byte that is not a character of its own is not shown as one.
std::string show_escape(char c) {
  return c > 0x20 && c < 0x7f ? std::string("\\") + c : "of " + show_char(c);
}

}  // namespace

bool is_word_start(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
}

size_t word_length(std::string_view text) {
  size_t n = 1;
  for (; n < text.size(); ++n) {
    const char c = text[n];
    if (c == '-' && n + 1 < text.size() && text[n + 1] == '>') break;
    if (!is_word_start(c) && c != '.' && c != ':' && c != '/' && c != '-') break;
  }
  return n;
}

void fail_at(const TextPlace& place, const std::string& message) {
  throw UserError("[ir] " + std::string(place.source) + ":" + std::to_string(place.line) + ":" +
                  std::to_string(place.column) + ": " + message);
}

void tokenize(std::string_view line, const TextPlace& place, std::vector<Token>* tokens) {
  tokens->clear();
  size_t at = 0;
  const auto push = [&](TokenKind kind, size_t length) {
    tokens->push_back({kind, line.substr(at, length), static_cast<int>(at) + 1});
    at += length;
  };
  while (at < line.size()) {
    const char c = line[at];
    const TextPlace here{place.source, place.line, static_cast<int>(at) + 1};
    if (c == ' ' || c == '\t' || c == '\r') {
      ++at;
    } else if (c == '#') {
      break;
    } else if (is_word_start(c)) {
      push(TokenKind::kWord, word_length(line.substr(at)));
    } else if (c == '"') {
      const size_t length = string_length(line.substr(at));
      if (length == 0) {
        fail_at(here,
                "this string has no closing quote on its line. Close it with \", or save "
                "the program again if the text was cut short.");
      }
      tokens->push_back({TokenKind::kString, line.substr(at + 1, length - 2), here.column});
      at += length;
    } else if (line.substr(at, 2) == "->") {
      push(TokenKind::kArrow, 2);
    } else if (punctuation(c) != TokenKind::kEnd) {
      push(punctuation(c), 1);
    } else {
      fail_at(here, "unexpected " + show_char(c) + ". Remove it, or quote the name it is in.");
    }
  }
  tokens->push_back({TokenKind::kEnd, {}, static_cast<int>(at) + 1});
}

std::string unescape(const Token& token, const TextPlace& place) {
  std::string out;
  out.reserve(token.text.size());
  for (size_t i = 0; i < token.text.size(); ++i) {
    if (token.text[i] != '\\') {
      out += token.text[i];
      continue;
    }
    const char c = token.text[++i];  // string_length saw to it that there is one
    switch (c) {
      case 'n':
        out += '\n';
        break;
      case 'r':
        out += '\r';
        break;
      case 't':
        out += '\t';
        break;
      case '"':
      case '\\':
        out += c;
        break;
      default:
        fail_at({place.source, place.line, token.column + static_cast<int>(i)},
                "unknown escape " + show_escape(c) + ". Use one of \\\" \\\\ \\n \\r \\t.");
    }
  }
  return out;
}

std::string quote(std::string_view text) {
  std::string out = "\"";
  for (char c : text) {
    switch (c) {
      case '\n':
        out += "\\n";
        break;
      case '\r':
        out += "\\r";
        break;
      case '\t':
        out += "\\t";
        break;
      case '"':
      case '\\':
        out += '\\';
        out += c;
        break;
      default:
        out += c;
    }
  }
  return out + '"';
}

}  // namespace deepcompile
