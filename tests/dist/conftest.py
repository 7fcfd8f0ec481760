# SPDX-License-Identifier: Apache-2.0
"""Which tests of real ranks are end to end: whole training runs. `pytest -m e2e` selects them."""

from __future__ import annotations

import pytest

END_TO_END = ("test_train_models.py", "test_train_resume.py", "test_demo.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name in END_TO_END:
            item.add_marker(pytest.mark.e2e)
