# SPDX-License-Identifier: Apache-2.0
"""Every source file states its licence in its first three lines."""

from __future__ import annotations

import sys
from pathlib import Path

from repo_files import ROOT, repo_files, report

LINE = "SPDX-License-Identifier: Apache-2.0"
KINDS = (".h", ".cpp", ".cu", ".py", ".sh", ".js", ".css", ".j2", ".cmake", "CMakeLists.txt",
         "Makefile")  # fmt: skip


def check_file(path: Path, root: Path = ROOT) -> list[str]:
    """An error if the line is missing."""
    head = path.read_text(encoding="utf-8").splitlines()[:3]
    if any(LINE in line for line in head):
        return []
    return [f"{path.relative_to(root)}: first line must be a comment with {LINE!r}"]


def main() -> int:
    files = repo_files(*KINDS) + [ROOT / ".ci" / "run"]
    return report([error for path in files for error in check_file(path)])


if __name__ == "__main__":
    sys.exit(main())
