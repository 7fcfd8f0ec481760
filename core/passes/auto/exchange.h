// SPDX-License-Identifier: Apache-2.0
// The end of `auto`'s search by levels. A level takes so many bytes from the front of one menu
// after another, by estimates; the best plan often takes a little from each, and less. So parts of
// what a choice frees in one way are freed in another, or not at all, as far as budget and
// simulator agree.
#pragma once

#include "passes/auto/builders.h"
#include "passes/auto/memory_menu.h"
#include "passes/auto/search.h"

namespace deepcompile {

// Of each of these `best` is within the budget, and the result is never worse. At most so many
// choices are tried.
//
// Parts of one way for another, by bytes.
Found exchange_parts(Builders& builders, const MemoryMenu& menu, Found best, int trials);
// What is freed and need not be: parts of it, and one by one.
Found give_back_parts(Builders& builders, const MemoryMenu& menu, Found best, int trials);
Found give_back_singly(Builders& builders, const MemoryMenu& menu, Found best, int trials);
// More of one way, and what is then needless of all: the best of nine such, so many times. Up to 17
// choices are tried for each.
Found free_more(Builders& builders, const MemoryMenu& menu, Found best, int rounds);

}  // namespace deepcompile
