# SPDX-License-Identifier: Apache-2.0
"""Relative links and images in Markdown files lead to files and headings that exist."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from repo_files import ROOT, repo_files, report

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)[^)]*\)")
FENCE = re.compile(r"^(```|~~~)")


def anchors(text: str) -> set[str]:
    """Names of a Markdown file's headings as links spell them."""
    names = set()
    for line in _prose(text):
        if line.startswith("#"):
            title = line.lstrip("#").strip().lower()
            title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
            names.add(re.sub(r"[^\w\- ]", "", title).replace(" ", "-"))
    return names


def _prose(text: str) -> list[str]:
    """The lines outside code fences."""
    lines, inside = [], False
    for line in text.splitlines():
        if FENCE.match(line.strip()):
            inside = not inside
        elif not inside:
            lines.append(line)
    return lines


def check_file(path: Path, root: Path = ROOT) -> list[str]:
    """The broken links of one Markdown file."""
    text = path.read_text(encoding="utf-8")
    errors = []
    for target in LINK.findall("\n".join(_prose(text))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists():
            errors.append(f"{path.relative_to(root)}: {target} does not exist")
        elif anchor and file.suffix == ".md":
            if anchor not in anchors(file.read_text(encoding="utf-8")):
                errors.append(f"{path.relative_to(root)}: {target}: no such heading")
    return errors


def main() -> int:
    return report([error for path in repo_files(".md") for error in check_file(path)])


if __name__ == "__main__":
    sys.exit(main())
