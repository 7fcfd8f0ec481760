# SPDX-License-Identifier: Apache-2.0
"""Every check of the sources' form, one line each; the whole output of those that fail."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from repo_files import ROOT, repo_files

CHECKS = ("check_includes", "check_sizes", "check_spdx", "check_links", "check_limits")


def tool(name: str) -> str:
    """A program beside this Python, else on the path."""
    beside = Path(sysconfig.get_path("scripts")) / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        sys.exit(f"[lint] {name} is missing: run 'make install', or pip install {name}")
    return found


def commands(fix: bool) -> list[tuple[str, list[str]]]:
    """(name, command) of each check."""
    cpp = [str(p.relative_to(ROOT)) for p in repo_files(".h", ".cpp", ".cu")]
    prose = [str(p.relative_to(ROOT)) for p in repo_files(".md", ".h", ".cpp", ".cu", ".py", ".js")]
    form = ["-i"] if fix else ["--dry-run", "-Werror"]
    ruff = tool("ruff")
    found = [
        ("clang-format", [tool("clang-format"), *form, *cpp]),
        ("ruff check", [ruff, "check", *(["--fix"] if fix else []), "."]),
        ("ruff format", [ruff, "format", *([] if fix else ["--check"]), "."]),
        ("spelling", [tool("codespell"), *prose]),
    ]
    found += [(name, [sys.executable, f"tools/{name}.py"]) for name in CHECKS]
    found.append(
        ("config page", [sys.executable, "tools/config_page.py", *([] if fix else ["--check"])])
    )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fix", action="store_true", help="rewrite what can be rewritten")
    failed = []
    for name, command in commands(parser.parse_args().fix):
        start = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        word = "ok" if done.returncode == 0 else "FAILED"
        print(f"  {name:<16} {word:<7} {time.monotonic() - start:5.1f} s", flush=True)
        if done.returncode != 0:
            failed.append(name)
            print(done.stdout + done.stderr)
    if failed:
        print(f"[lint] failed: {', '.join(failed)}. 'make format' rewrites what can be rewritten.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
