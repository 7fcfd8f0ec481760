# SPDX-License-Identifier: Apache-2.0
"""Lengths that keep a file readable: header 200 lines, source 500, test 600, function 60."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

from repo_files import ROOT, repo_files, report

HEADER, SOURCE, TEST, FUNCTION = 200, 500, 600, 60
# With clang-format's style a function's body at namespace level opens at the
# end of an unindented line and closes with an unindented brace.
_NO_FUNCTION = re.compile(r"^(namespace|class|struct|enum|union|extern|typedef|constexpr|const |#)")


def limit_of(place: Path) -> int:
    """Most lines a file at this place may have."""
    if place.parts[0] == "tests":
        return TEST
    return HEADER if place.suffix == ".h" else SOURCE


def long_python_functions(text: str) -> list[tuple[str, int, int]]:
    """(name, line, length) of the functions above the limit."""
    return [
        (node.name, node.lineno, node.end_lineno - node.lineno + 1)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > FUNCTION
    ]


def long_cpp_functions(text: str) -> list[tuple[str, int, int]]:
    """(first line's text, line, length) of the namespace-level functions above the limit."""
    found = []
    opened: tuple[str, int] | None = None
    for number, line in enumerate(text.splitlines(), 1):
        if opened is None:
            unindented = line[:1] not in ("", " ", "}", "/")
            if unindented and line.endswith("{") and not _NO_FUNCTION.match(line):
                opened = (line.split("(")[0].split()[-1], number)
        elif line.startswith("}"):
            length = number - opened[1] + 1
            if length > FUNCTION:
                found.append((*opened, length))
            opened = None
    return found


def check_file(path: Path, root: Path = ROOT) -> list[str]:
    """What is too long in one file."""
    place = path.relative_to(root)
    text = path.read_text(encoding="utf-8")
    lines = text.count("\n")
    errors = []
    if lines > limit_of(place):
        errors.append(f"{place}: {lines} lines, the limit is {limit_of(place)}: split it")
    functions = long_python_functions if path.suffix == ".py" else long_cpp_functions
    if path.suffix in (".py", ".cpp", ".cu", ".h"):
        for name, line, length in functions(text):
            errors.append(f"{place}:{line}: {name} has {length} lines, the limit is {FUNCTION}")
    return errors


def main() -> int:
    files = repo_files(".h", ".cpp", ".cu", ".py", ".js", ".css", ".sh", ".j2")
    return report([error for path in files for error in check_file(path)])


if __name__ == "__main__":
    sys.exit(main())
