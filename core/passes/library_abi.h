/* SPDX-License-Identifier: Apache-2.0
 * How a pass in a user's shared library and its host talk: C, and text.
 *
 * The library exports deepcompile_pass_library(), which returns a table that
 * lives as long as the library. A program crosses as its text form, which
 * round-trips exactly, so host and library may come from different compilers,
 * standard libraries and versions of deepcompile with the same ABI number.
 * Nothing throws across. Reasons for choices travel in the program's text.
 *
 * C++ users need not read this: see sim/export_pass.h.
 */
#ifndef DEEPCOMPILE_PASSES_LIBRARY_ABI_H
#define DEEPCOMPILE_PASSES_LIBRARY_ABI_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DEEPCOMPILE_PASS_ABI 1
#define DEEPCOMPILE_PASS_SYMBOL "deepcompile_pass_library"

typedef struct DeepcompilePassLibrary {
  uint32_t abi;   /* DEEPCOMPILE_PASS_ABI of the headers that the library was built with */
  uint32_t count; /* passes */

  /* JSON: {"name": "..", "summary": "..", "needs": [fact..], "provides": [..],
   * "conflicts": [..]}. Facts are words: gathers_placed, reductions_placed, ...
   * Lives as long as the library. */
  const char* (*describe)(uint32_t pass);

  /* request, JSON: {"program": text, "memory_budget": bytes or null,
   * "early_updates": bool, "prices": PriceList or null}.
   * The answer, JSON: {"program": text} or {"error": text}. The
   * host gives it back to free_text. */
  char* (*run)(uint32_t pass, const char* request);
  void (*free_text)(char* text);
} DeepcompilePassLibrary;

typedef const DeepcompilePassLibrary* (*DeepcompilePassLibraryFunction)(void);

#ifdef __cplusplus
}
#endif

#endif
