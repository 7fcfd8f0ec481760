# SPDX-License-Identifier: Apache-2.0
"""compile.gather on its way from the configuration to the runtime and the report."""

import pytest
import torch

import deepcompile
from deepcompile.config import load_config
from deepcompile.errors import UserError


def test_other_words_are_refused():
    with pytest.raises(UserError, match="compile.gather: must be one of nccl, copy_engine, auto"):
        load_config({"compile": {"gather": "symmetric"}})


@pytest.mark.parametrize("gather", ["nccl", "copy_engine", "auto"])
def test_one_rank_gathers_nothing(gather):
    model = torch.nn.Linear(4, 4)
    config = {"train_micro_batch_size_per_gpu": 1, "compile": {"gather": gather}}
    config["optimizer"] = {"type": "AdamW"}
    engine, *_ = deepcompile.initialize(model=model, config=config)
    found = engine.compile_report()["gathers"]
    assert found == {"transport": "nccl", "why": "one rank has nothing to gather"}
    assert engine.runtime.outside_bytes() == 0


def test_unknown_options_of_the_runtime_are_errors():
    from deepcompile import _runtime

    with pytest.raises(UserError, match='copy_engine_options has no "chunk"'):
        _runtime.Runtime(None, 0, 1, torch.device("cpu"), copy_engine_options={"chunk": 1})
