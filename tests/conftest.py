# SPDX-License-Identifier: Apache-2.0
"""Helpers that several test folders share live in tests/dist: ranks.py, toy_step.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "dist"))
