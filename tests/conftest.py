# SPDX-License-Identifier: Apache-2.0
"""Helpers that several test folders share live in tests/dist: ranks.py, toy_step.py."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "dist"))


@pytest.fixture(scope="session")
def failing_allocator(tmp_path_factory) -> str:
    """The library of failing_memory.FailingMemory."""
    import failing_memory

    return failing_memory.build(tmp_path_factory.mktemp("failing_allocator"))
