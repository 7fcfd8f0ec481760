# SPDX-License-Identifier: Apache-2.0
"""Core layers include only themselves and the layers before them; torch only in the runtime."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from repo_files import ROOT, repo_files, report

LAYERS = ("base", "ir", "analysis", "cost", "passes", "plan", "sim", "runtime", "report")
TORCH = re.compile(r'#include\s*[<"](torch|ATen|c10|caffe2|cuda|nccl|pybind11|Python\.h)')
LOCAL = re.compile(r'#include\s*"([^"]+)"')


def check_file(path: Path, root: Path = ROOT) -> list[str]:
    """The wrong includes of one C++ file under core/."""
    place = path.relative_to(root)
    layer = place.parts[1]
    if layer not in LAYERS:
        return [f"{place}: {layer} is no layer of the core: {', '.join(LAYERS)}"]
    errors = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if layer != "runtime" and TORCH.search(line):
            errors.append(f"{place}:{number}: only core/runtime may include torch: {line.strip()}")
        local = LOCAL.search(line)
        if not local:
            continue
        target = local.group(1).split("/")[0]
        if target not in LAYERS:
            continue
        if layer == "report" and target == "runtime":
            errors.append(f"{place}:{number}: core/report reads records, not the runtime")
        elif LAYERS.index(target) > LAYERS.index(layer):
            errors.append(f"{place}:{number}: core/{layer} may not include core/{target}")
    return errors


def main() -> int:
    files = [p for p in repo_files(".h", ".cpp", ".cu") if p.relative_to(ROOT).parts[0] == "core"]
    return report([error for path in files for error in check_file(path)])


if __name__ == "__main__":
    sys.exit(main())
