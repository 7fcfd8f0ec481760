# SPDX-License-Identifier: Apache-2.0
"""The files of this repository that the checks look at."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_OUTSIDE = {".git", "build", "__pycache__", "demo-output"}


def repo_files(*suffixes: str) -> list[Path]:
    """Tracked and new files with one of ``suffixes`` (or such a name), sorted.

    Without git (a source archive), every file outside the build folders.
    """
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others"]
    listed = subprocess.run([*command, "--exclude-standard"], capture_output=True, text=True)
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        paths = [
            path
            for path in ROOT.rglob("*")
            if not _OUTSIDE.intersection(path.relative_to(ROOT).parts)
            and not path.relative_to(ROOT).parts[0].startswith(".venv")
        ]
    chosen = (p for p in paths if p.is_file() and (p.suffix in suffixes or p.name in suffixes))
    return sorted(set(chosen))


def report(errors: list[str]) -> int:
    """Print the errors; the exit code."""
    for error in errors:
        print(error)
    return 1 if errors else 0
