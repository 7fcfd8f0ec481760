# SPDX-License-Identifier: Apache-2.0
"""GPU tests share the tools of tests/dist: ranks.py and what trains on them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "dist"))
