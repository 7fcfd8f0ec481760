# SPDX-License-Identifier: Apache-2.0
"""Prints the requirements of pyproject.toml: the project's own, and those of the extras named.

``build`` stands for the build system's. Python 3.10 has no TOML reader, so
there pip's own is used.
"""

from __future__ import annotations

import sys
from pathlib import Path

try:
    import tomllib
except ImportError:
    from pip._vendor import tomli as tomllib


def main() -> int:
    text = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    content = tomllib.loads(text)
    wanted = list(content["project"]["dependencies"])
    for extra in sys.argv[1:]:
        if extra == "build":
            wanted += content["build-system"]["requires"]
        else:
            wanted += content["project"]["optional-dependencies"][extra]
    print("\n".join(dict.fromkeys(wanted)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
