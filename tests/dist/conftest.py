# SPDX-License-Identifier: Apache-2.0
"""Which tests of real ranks are end to end: whole training runs. `pytest -m e2e` selects them."""

from __future__ import annotations

import fake_driver
import pytest

END_TO_END = ("test_train_models.py", "test_train_resume.py", "test_demo.py")
LEFT_OUT = (
    "test_demo_resumes_with_the_same_losses",  # test_train_resume.py resumes too
    "test_compiled_training_equals_pytorch[1-",  # two ranks train the same models
    "test_compiled_training_equals_pytorch[4-",
    "test_stages_give_the_same_bits",  # the runtime's doing, whatever torch compiles
    "test_other_ranks_stages_and_modes_go_on[1-",  # two to two is kept
    "test_other_ranks_stages_and_modes_go_on[4-",
)
"""How the names of those begin that the end-to-end ones on another torch do without."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name in END_TO_END and not item.name.startswith(LEFT_OUT):
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def driver(tmp_path_factory) -> str:
    """A library in libcuda's place."""
    return fake_driver.build(tmp_path_factory.mktemp("driver"))
