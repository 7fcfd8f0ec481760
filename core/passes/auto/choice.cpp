// SPDX-License-Identifier: Apache-2.0
#include "passes/auto/choice.h"

#include <charconv>
#include <sstream>
#include <tuple>
#include <utility>

#include "base/error.h"

namespace deepcompile {
namespace {

std::string counted(size_t count, const std::string& what) {
  return std::to_string(count) + " " + what + (count == 1 ? "" : "s");
}

}  // namespace

bool better(const Trial& a, const Trial& b) {
  if (a.fits != b.fits) return a.fits;
  if (!a.fits) return std::tuple(a.peak, a.time) < std::tuple(b.peak, b.time);
  return std::tuple(a.time, a.peak) < std::tuple(b.time, b.peak);
}

std::string describe(const AutoChoice& choice) {
  std::string text = counted(choice.recompute.size(), "region") + " recomputed, " +
                     counted(choice.offload_values.size(), "activation") + " and the states of " +
                     counted(choice.offload_states.size(), "parameter") +
                     " offloaded, updates in " + std::string(to_string(choice.place));
  if (choice.place == Place::kNextForward) text += " " + counted(choice.ahead, "run") + " ahead";
  text += choice.keep ? ", " + counted(choice.keep->size(), "gap") + " closed"
                      : ", gaps closed up to the budget less " + pretty(choice.reserve);
  if (choice.prefetch) text += ", gathers up to " + pretty(*choice.prefetch) + " ahead";
  for (size_t s = 0; s < choice.limits.size(); ++s) {
    text += (s == 0 ? ", gathers ahead by section " : " ");
    text += choice.limits[s] < Bytes{0} ? "-" : to_string(choice.limits[s]);
  }
  if (choice.coalesce) text += ", what can starts together";
  return text;
}

std::string print_levels(const AutoChoice& choice) {
  const auto text_of = [](Bytes limit) {
    return limit < Bytes{0} ? std::string("-") : to_string(limit);
  };
  std::string text = "levels: spare=" + to_string(choice.spare) +
                     " ahead=" + std::to_string(choice.ahead) +
                     " order=" + std::to_string(choice.order_simulations) +
                     " coalesce=" + std::to_string(choice.coalesce ? 1 : 0);
  if (choice.prefetch) text += " prefetch=" + text_of(*choice.prefetch);
  for (size_t s = 0; s < choice.limits.size(); ++s) {
    text += (s == 0 ? " limits=" : ",") + text_of(choice.limits[s]);
  }
  return text;
}

namespace {

int to_int(const std::string& text) {
  int number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc{} || end != text.data() + text.size() || number < 0) {
    throw UserError("[passes] levels: '" + text + "' is not a number of a plan's. Plan anew.");
  }
  return number;
}

void read_words(const std::string& text, AutoChoice* choice) {
  choice->limits.clear();
  std::istringstream words(text);
  for (std::string word; words >> word;) {
    const size_t equals = word.find('=');
    const std::string key = word.substr(0, equals), value = word.substr(equals + 1);
    if (key == "spare") choice->spare = parse_bytes(value);
    if (key == "ahead") choice->ahead = to_int(value);
    if (key == "order") choice->order_simulations = to_int(value);
    if (key == "coalesce") choice->coalesce = value == "1";
    if (key == "prefetch") choice->prefetch = parse_bytes(value);
    if (key != "limits") continue;
    std::istringstream limits(value);
    for (std::string each; std::getline(limits, each, ',');) {
      choice->limits.push_back(each == "-" ? Bytes{-1} : parse_bytes(each));
    }
  }
}

}  // namespace

void read_levels(const std::string& text, AutoChoice* choice) {
  if (!text.starts_with("levels: ")) return;
  AutoChoice read = *choice;
  try {
    read_words(text.substr(8), &read);
  } catch (const UserError&) {  // written by hand
    return;
  }
  *choice = std::move(read);
}

}  // namespace deepcompile
