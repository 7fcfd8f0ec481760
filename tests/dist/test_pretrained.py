# SPDX-License-Identifier: Apache-2.0
"""Pretrained weights: one rank loads them, from a folder as Hugging Face writes it."""

from __future__ import annotations

import cases
import pytest
import torch
from ranks import run_ranks

pytestmark = pytest.mark.timeout(600)


def _loaded(rank: int, world: int, folder: str) -> dict:
    import deepcompile

    model = deepcompile.models.pretrained(folder, local_files_only=True)
    meta = {p.is_meta for p in model.parameters()}
    engine = deepcompile.initialize(model=model, config=cases.config_for(world, 3))[0]
    state = {name: value.clone() for name, value in engine.state_dict().items()}
    losses, _ = cases.train_steps(engine, 0, 1)
    return {"meta": meta, "state": state, "losses": losses}


@pytest.mark.parametrize("name", ["llama_tied", "mixtral"])
def test_a_folder_is_read_by_rank_0_alone(name, tmp_path):
    model = cases.make(name)
    model.save_pretrained(tmp_path)
    expected = model.state_dict()
    results = run_ranks(_loaded, 2, str(tmp_path), timeout=120)
    assert [result["meta"] for result in results] == [{False}, {True}]
    for result in results:
        assert result["losses"] == results[0]["losses"]
        for member, value in expected.items():
            assert torch.equal(result["state"][member], value), member


def test_what_cannot_be_loaded_is_one_error(tmp_path):
    import deepcompile

    for name, said in (("no/such-model", "no/such-model"), (tmp_path, str(tmp_path))):
        with pytest.raises(deepcompile.UserError, match="save_pretrained") as caught:
            deepcompile.models.pretrained(name, local_files_only=True)
        assert said in str(caught.value)
