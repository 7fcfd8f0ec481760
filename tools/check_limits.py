# SPDX-License-Identifier: Apache-2.0
"""Each row of docs/limits.md names a test that exists.

The last column holds ``path/to/test_file.py::test_name`` or
``path/to/file_test.cpp::Suite.Name``, in backquotes.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from repo_files import ROOT, report

NAMED = re.compile(r"`([\w./-]+)::([\w.]+)`")


def rows(text: str) -> list[list[str]]:
    """The cells of every table row, headings and rules left out."""
    found: list[list[str]] = []
    for line in text.splitlines():
        if not line.startswith("|") or set(line) <= set("|-: "):
            continue
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return [cells for cells in found if cells[-1] != "Test"]


def has_test(text: str, suffix: str, name: str) -> bool:
    """Whether a test file's text defines the test."""
    if suffix == ".py":
        return re.search(rf"^\s*def {re.escape(name)}\(", text, re.M) is not None
    suite, _, test = name.partition(".")
    pattern = rf"^TEST(_F|_P)?\(\s*{re.escape(suite)},\s*{re.escape(test)}\)"
    return re.search(pattern, text, re.M) is not None


def check(page: Path, root: Path = ROOT) -> list[str]:
    """Rows without a test, and tests that are not there."""
    errors = []
    for cells in rows(page.read_text(encoding="utf-8")):
        named = NAMED.findall(cells[-1])
        if not named:
            errors.append(f"{page.relative_to(root)}: {cells[0]!r} names no test")
        for file, name in named:
            path = root / file
            if not path.is_file():
                errors.append(f"{page.relative_to(root)}: {cells[0]!r}: {file} does not exist")
            elif not has_test(path.read_text(encoding="utf-8"), path.suffix, name):
                errors.append(f"{page.relative_to(root)}: {cells[0]!r}: {file} has no {name}")
    return errors


def main() -> int:
    return report(check(ROOT / "docs" / "limits.md"))


if __name__ == "__main__":
    sys.exit(main())
