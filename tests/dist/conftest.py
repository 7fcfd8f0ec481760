# SPDX-License-Identifier: Apache-2.0
"""Which tests of real ranks are end to end: whole training runs. `pytest -m e2e` selects them."""

from __future__ import annotations

import fake_driver
import pytest

END_TO_END = ("test_train_models.py", "test_train_resume.py", "test_demo.py")
LONG = ("test_demo_resumes_with_the_same_losses",)
"""Resuming is in test_train_resume.py too."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name in END_TO_END and item.name not in LONG:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def driver(tmp_path_factory) -> str:
    """A library in libcuda's place."""
    return fake_driver.build(tmp_path_factory.mktemp("driver"))
