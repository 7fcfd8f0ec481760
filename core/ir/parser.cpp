// SPDX-License-Identifier: Apache-2.0
// Recursive descent over one line at a time: no statement spans lines.
#include <charconv>
#include <utility>

#include "base/error.h"
#include "base/lists.h"
#include "ir/lexer.h"
#include "ir/text.h"

namespace deepcompile {
namespace {

constexpr std::string_view kStage = "[ir] ";
constexpr const char* kStatements =
    "step, param, value, region, forward, backward, inference, update, because";

std::string instruction_names() {
  std::string out;
  for (int i = 0; i < kOpCount; ++i) {
    out.append(traits(static_cast<Op>(i)).name).append(", ");
  }
  return out + "end";
}

class Parser {
 public:
  Parser(std::string_view text, std::string_view source) : text_(text), place_{source, 0, 1} {}

  StepProgram parse() {
    while (next_line()) {
      if (peek().kind == TokenKind::kEnd) continue;
      const Token first = expect_word("a statement");
      if (!has_header_ && first.text != "step") {
        fail(first, "a program begins with `step <name> world=<ranks>`, not with '" +
                        std::string(first.text) + "'. Add that line.");
      }
      if (section_) {
        instruction(first);
      } else {
        statement(first);
      }
      expect_line_end();
    }
    if (!has_header_) {
      fail_at({place_.source, 1, 1},
              "the text is empty. A program begins with `step <name> world=<ranks>`.");
    }
    if (section_) {
      fail_at(place_, "the text ends inside " + section_name(*section_) + ", which began on line " +
                          std::to_string(section_line_) +
                          ": it was cut short. Save the program again, or close the section with "
                          "`end`.");
    }
    return std::move(program_);
  }

 private:
  // --- lines and tokens -----------------------------------------------------
  bool next_line() {
    if (text_.empty()) return false;
    const size_t end = text_.find('\n');
    const std::string_view line = text_.substr(0, end);
    text_ = end == std::string_view::npos ? std::string_view{} : text_.substr(end + 1);
    ++place_.line;
    place_.column = 1;
    tokenize(line, place_, &tokens_);
    place_.column = tokens_.back().column;
    at_ = 0;
    said_.clear();
    return true;
  }

  const Token& peek() const { return tokens_[at_]; }
  bool at(TokenKind kind) const { return peek().kind == kind; }
  Token take() { return at(TokenKind::kEnd) ? tokens_[at_] : tokens_[at_++]; }
  bool accept(TokenKind kind) {
    if (!at(kind)) return false;
    ++at_;
    return true;
  }

  [[noreturn]] void fail(const Token& token, const std::string& message) const {
    fail_at({place_.source, place_.line, token.column}, message);
  }

  [[noreturn]] void fail_expected(const Token& token, const std::string& what) const {
    if (token.kind == TokenKind::kEnd) {
      fail(token,
           "the line ends where " + what +
               " belongs. Complete it, or save the program again if the text was cut short.");
    }
    fail(token, "found '" + std::string(token.text) + "' where " + what + " belongs. Replace it.");
  }

  Token expect(TokenKind kind, const char* what) {
    if (!at(kind)) fail_expected(peek(), what);
    return take();
  }
  Token expect_word(const char* what) { return expect(TokenKind::kWord, what); }

  void expect_line_end() {
    if (at(TokenKind::kEnd)) return;
    fail(peek(), "found '" + std::string(peek().text) +
                     "' after the end of the statement. Remove it, or begin a new line.");
  }

  int64_t number(const Token& token) const {
    int64_t out = 0;
    const char* end = token.text.data() + token.text.size();
    const auto result = std::from_chars(token.text.data(), end, out);
    if (result.ec != std::errc{} || result.ptr != end) {
      fail(token, "'" + std::string(token.text) +
                      "' is not a whole number that fits 63 bits. "
                      "Write digits only.");
    }
    return out;
  }

  uint32_t small_number(const Token& token) const {
    const int64_t out = number(token);
    if (out > INT32_MAX)
      fail(token, "'" + std::string(token.text) +
                      "' is too large. Use at most "
                      "2147483647.");
    return static_cast<uint32_t>(out);
  }

  // Runs `build`, which may throw a UserError without a place, and adds the place.
  template <typename Build>
  auto placed(const Token& token, Build build) const {
    try {
      return build();
    } catch (const UserError& error) {
      std::string_view message = error.what();
      for (std::string_view stage : {kStage, std::string_view("[base] ")}) {
        if (message.starts_with(stage)) message.remove_prefix(stage.size());
      }
      fail(token, std::string(message));
    }
  }

  // This line says `what`; it may do so once.
  void say(const Token& token, std::string_view what) {
    if (contains(said_, what)) {
      fail(token, "a second " + std::string(what) + " in this line. Keep one of them.");
    }
    said_.push_back(what);
  }

  // --- operands -------------------------------------------------------------
  std::string word_or_string(const char* what) {
    if (at(TokenKind::kString)) {
      const Token token = take();
      return unescape(token, place_);
    }
    return std::string(expect_word(what).text);
  }

  ValueId value() {
    const Token token = expect_word("a value");
    if (const auto id = program_.find_value(token.text)) return *id;
    if (program_.find_param(token.text)) {
      fail(token, "'" + std::string(token.text) +
                      "' is a parameter where a value belongs. Name a "
                      "value.");
    }
    fail_unknown(token, "value");
  }

  ParamId param() {
    const Token token = expect_word("a parameter");
    if (const auto id = program_.find_param(token.text)) return *id;
    fail_unknown(token, "parameter");
  }

  [[noreturn]] void fail_unknown(const Token& token, const std::string& what) const {
    fail(token, "no " + what + " is named '" + std::string(token.text) +
                    "'. Define it above, or "
                    "correct the name.");
  }

  ParamRef param_ref() {
    const Token token = peek();
    ParamRef ref{param(), 0};
    if (accept(TokenKind::kLeft)) {
      ref.member = small_number(expect_word("a member's number"));
      expect(TokenKind::kRight, "']'");
    }
    const Param& owner = program_.param(ref.param);
    if (ref.member >= owner.members.size()) {
      fail(token, owner.name + " has " + std::to_string(owner.members.size()) +
                      " members and none is number " + std::to_string(ref.member) +
                      ". Members are counted from 0.");
    }
    return ref;
  }

  Operand operand() {
    if (at(TokenKind::kWord)) {
      if (const auto id = program_.find_value(peek().text)) {
        take();
        return *id;
      }
      if (!program_.find_param(peek().text)) fail_unknown(peek(), "value or parameter");
    } else {
      fail_expected(peek(), "a value or parameter");
    }
    return param_ref();
  }

  template <typename Item>
  auto list(Item item) {
    std::vector<decltype(item())> out;
    expect(TokenKind::kOpen, "'('");
    if (accept(TokenKind::kClose)) return out;
    do {
      out.push_back(item());
    } while (accept(TokenKind::kComma));
    expect(TokenKind::kClose, "',' or ')'");
    return out;
  }
  std::vector<ValueId> values() {
    return list([this] { return value(); });
  }

  // --- statements -----------------------------------------------------------
  void statement(const Token& first) {
    if (first.text == "step") return header(first);
    if (first.text == "param") return param_statement();
    if (first.text == "value") return value_statement();
    if (first.text == "region") return region_statement();
    if (first.text == "because") return reason_statement();
    if (const auto kind = parse_section_kind(first.text)) return begin_section(*kind);
    if (first.text == "end" || parse_op(first.text)) {
      fail(first, "'" + std::string(first.text) +
                      "' stands outside of every section. Begin one "
                      "with forward, backward, inference or update.");
    }
    fail(first,
         "unknown statement '" + std::string(first.text) + "'. Use one of " + kStatements + ".");
  }

  void header(const Token& first) {
    if (has_header_) fail(first, "a second `step` line. Keep one program in a text.");
    has_header_ = true;
    program_.name = word_or_string("the step's name");
    while (!at(TokenKind::kEnd)) {
      const Token key = expect_word("a header word");
      say(key, key.text);
      if (key.text == "clip" || key.text == "boundary") {
        (key.text == "clip" ? program_.clip : program_.boundary) = true;
        continue;
      }
      if (key.text != "world" && key.text != "accumulation" && key.text != "reduce") {
        fail(key, "unknown header word '" + std::string(key.text) +
                      "'. Use world=, accumulation=, "
                      "clip, boundary or reduce=.");
      }
      expect(TokenKind::kEquals, "'='");
      const Token setting = expect_word("a setting");
      if (key.text == "reduce") {
        program_.reduce_dtype = dtype(setting);
        continue;
      }
      const int64_t count = small_number(setting);
      if (count < 1) fail(setting, std::string(key.text) + " is 0. Give at least 1.");
      if (key.text == "accumulation" && count > kMostAccumulation) {
        fail(setting, "accumulation is " + std::string(setting.text) + ". Give at most " +
                          std::to_string(kMostAccumulation) + ".");
      }
      (key.text == "world" ? program_.world : program_.accumulation) = count;
    }
  }

  DType dtype(const Token& token) const {
    DType out{};
    if (parse_dtype(token.text, &out)) return out;
    fail(token, "unknown element type '" + std::string(token.text) +
                    "'. Use f32, f16, bf16 or "
                    "f64.");
  }

  void param_statement() {
    const Token name = expect_word("the parameter's name");
    Param param;
    param.name = name.text;
    param.dtype = dtype(expect_word("an element type"));
    param.numel = number(expect_word("the number of elements"));
    while (at(TokenKind::kWord)) {
      const Token word = take();
      if (const auto placement = parse_placement(word.text)) {
        say(word, "placement");
        param.placement = *placement;
      } else if (word.text == "frozen") {
        say(word, word.text);
        param.trainable = false;
      } else {
        fail(word, "unknown word '" + std::string(word.text) +
                       "' for a parameter. Use whole, "
                       "replicated or frozen.");
      }
    }
    if (!at(TokenKind::kEnd)) {
      const Token open = peek();
      param.members = list([this] { return word_or_string("a member's name"); });
      if (param.members.empty())
        fail(open,
             "the list of members is empty. Leave it out: a "
             "parameter is its own only member.");
    }
    placed(name, [&] { return program_.add_param(std::move(param)); });
  }

  void value_statement() {
    const Token name = expect_word("the value's name");
    const Token size = expect_word("the value's size");
    Value value;
    value.name = name.text;
    value.bytes = placed(size, [&] { return parse_bytes(std::string(size.text)); });
    while (at(TokenKind::kWord)) {
      const Token key = take();
      const bool row = key.text == "row" && value.rows_of;
      if (key.text != "grad" && key.text != "rows" && !row) {
        fail(key, "unknown word '" + std::string(key.text) +
                      "' for a value. Use grad=, or rows= and row=.");
      }
      say(key, key.text);
      expect(TokenKind::kEquals, "'='");
      if (row) {
        value.rows_of->row = number(expect_word("the elements of a row"));
      } else if (key.text == "rows") {
        value.rows_of = RowsOf{param(), 0};
      } else {
        value.grad_of = param_ref();
      }
    }
    placed(name, [&] { return program_.add_value(std::move(value)); });
  }

  void region_statement() {
    const Token name = expect_word("the region's name");
    Region region;
    region.name = name.text;
    while (at(TokenKind::kWord)) region_attribute(&region);
    region.inputs = list([this] { return operand(); });
    expect(TokenKind::kArrow, "'->'");
    region.outputs = values();
    placed(name, [&] { return program_.add_region(std::move(region)); });
  }

  void region_attribute(Region* region) {
    const Token key = take();
    say(key, key.text);
    if (key.text == "once" || key.text == "checkpoint") {
      (key.text == "once" ? region->once : region->checkpoint) = true;
      return;
    }
    const bool known = key.text == "code" || key.text == "workspace" || key.text == "moved" ||
                       key.text == "flops" || key.text == "time";
    if (!known) {
      fail(key, "unknown attribute '" + std::string(key.text) +
                    "' of a region. Use code=, "
                    "workspace=, moved=, flops=, time=, once or checkpoint.");
    }
    expect(TokenKind::kEquals, "'='");
    const Token setting = expect_word("a setting");
    const auto bytes = [&] {
      return placed(setting, [&] { return parse_bytes(std::string(setting.text)); });
    };
    if (key.text == "code") region->code = small_number(setting);
    if (key.text == "workspace") region->workspace = bytes();
    if (key.text == "moved") region->moved = bytes();
    if (key.text == "flops") region->flops = number(setting);
    if (key.text == "time") {
      region->time = placed(setting, [&] { return parse_nanos(std::string(setting.text)); });
    }
  }

  void reason_statement() {
    Reason reason;
    reason.pass = word_or_string("the pass's name");
    // Of two strings in a row, the first is the object.
    const bool two_strings = at(TokenKind::kString) && tokens_[at_ + 1].kind == TokenKind::kString;
    if (at(TokenKind::kWord) || two_strings) reason.object = word_or_string("an object's name");
    const Token text = expect(TokenKind::kString, "the reason in quotes");
    reason.text = unescape(text, place_);
    program_.reasons.push_back(std::move(reason));
  }

  // --- sections -------------------------------------------------------------
  void begin_section(SectionKind kind) {
    Section section;
    section.kind = kind;
    if (kind != SectionKind::kUpdate) {
      section.graph = small_number(expect_word("the graph's number"));
      section.inputs = values();
      expect(TokenKind::kArrow, "'->'");
      section.outputs = values();
    }
    program_.sections.push_back(std::move(section));
    section_ = &program_.sections.back();
    section_line_ = place_.line;
  }

  void instruction(const Token& first) {
    if (first.text == "end") {
      section_ = nullptr;
      return;
    }
    const auto op = parse_op(first.text);
    if (!op) {
      fail(first, "unknown instruction '" + std::string(first.text) + "' in " +
                      section_name(*section_) + ". Use one of " + instruction_names() + ".");
    }
    // `update` followed by no operand is the section's word: the `end` before it is missing.
    if (*op == Op::kUpdate && at(TokenKind::kEnd)) {
      fail(first, "a section begins inside " + section_name(*section_) +
                      ". Close that one with `end` first.");
    }
    Instr instr;
    instr.op = *op;
    const OpTraits& of = traits(*op);
    if (of.takes_param) instr.param = param();
    if (of.takes_region) instr.region = region();
    if (of.takes_values) instr.values = values();
    section_->instrs.push_back(std::move(instr));
  }

  RegionId region() {
    const Token token = expect_word("a region");
    if (const auto id = program_.find_region(token.text)) return *id;
    fail_unknown(token, "region");
  }

  std::string_view text_;  // what is left, from the next line on
  TextPlace place_;        // the current line; its column is the line's end
  std::vector<Token> tokens_;
  size_t at_ = 0;
  std::vector<std::string_view> said_;  // by the current line
  StepProgram program_;
  bool has_header_ = false;
  Section* section_ = nullptr;
  int section_line_ = 0;
};

}  // namespace

StepProgram parse_program(std::string_view text, std::string_view source) {
  return Parser(text, source).parse();
}

}  // namespace deepcompile
