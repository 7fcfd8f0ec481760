# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of what is not plain: NumPy's numbers, modules' own states, a folder that ranks do
not share; and masters where a whole parameter was written to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_checkpoint import META, ONE, shards
from test_engine import LR, batch, config, small, start, step
from torch import nn

import deepcompile
from deepcompile import UserError, checkpoint
from deepcompile.checkpoint_values import plain
from deepcompile.distributed import Ranks


def test_learning_rates_of_numpy_are_saved_as_numbers(tmp_path):
    def schedule(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s: 0.5 * (1 + np.cos(np.pi * s / 100))
        )

    first = start(lr_scheduler=schedule)
    step(first)
    first.save_checkpoint(tmp_path)
    second = start(lr_scheduler=schedule)
    second.load_checkpoint(tmp_path)
    assert second.optimizer.param_groups[0]["lr"] == first.optimizer.param_groups[0]["lr"] < LR
    assert step(second, 1) == step(first, 1)


def test_numbers_of_other_libraries_become_pythons():
    found = plain(
        {"a": np.float64(0.5), "b": [np.int64(3), (np.float32(2), True)], "c": {"d": np.bool_(1)}}
    )
    assert found == {"a": 0.5, "b": [3, (2.0, True)], "c": {"d": True}}
    kinds = [found["a"], found["b"][0], *found["b"][1], found["c"]["d"]]
    assert [type(each) for each in kinds] == [float, int, float, bool, bool]


class Counting(nn.Module):
    """Keeps a number that is no tensor."""

    def __init__(self):
        super().__init__()
        self.inner, self.seen = nn.Linear(8, 8), 0

    def forward(self, x):
        self.seen += 1
        return self.inner(x)

    def get_extra_state(self):
        return {"seen": self.seen, "as a tensor": torch.tensor(self.seen)}

    def set_extra_state(self, state):
        self.seen = state["seen"]


def test_modules_own_states_come_back(tmp_path):
    first = start(nn.Sequential(Counting(), Counting()))
    for number in range(3):
        first(torch.ones(4, 8) if number else torch.zeros(4, 8))
    first.save_checkpoint(tmp_path)
    second = start(nn.Sequential(Counting(), Counting()))
    second.load_checkpoint(tmp_path)
    assert [each.seen for each in second.module] == [3, 3]


def test_a_part_that_is_elsewhere_is_missed_before_anything_is_replaced(tmp_path):
    pickled = {"client": {}, "extra": {}}
    checkpoint.save(tmp_path, "one", shards(7), META, pickled, ONE)
    (tmp_path / "one").rename(tmp_path / "two.tmp")
    with pytest.raises(UserError, match="rank 1's part is not in it"):
        checkpoint._publish(tmp_path, "two", world=2)
    (part,) = (tmp_path / "two.tmp").glob("*.distcp")
    part.unlink()
    with pytest.raises(UserError, match="a part is not in it"):
        checkpoint._publish(tmp_path, "two", world=1)
    assert not (tmp_path / "two").exists() and (tmp_path / "latest").read_text() == "one"


def test_what_is_not_written_to_keeps_its_master():
    """The biases share a flat parameter, and bf16 weights hold less than their masters."""
    engine = deepcompile.initialize(model=small(), config=config(bf16={"enabled": True}))[0]
    for number in range(3):
        engine.backward(engine(batch(number).bfloat16()).float().pow(2).mean())
        engine.step()
    before = engine.state_dict(fp32=True)
    bias = engine.module[0].bias
    with deepcompile.GatheredParameters(engine, bias, modifier_rank=0), torch.no_grad():
        bias[5] = 7.0
    after = engine.state_dict(fp32=True)
    changed = {name: torch.nonzero(after[name] != before[name]).flatten() for name in before}
    assert {name: where.tolist() for name, where in changed.items() if len(where)} == {
        "0.bias": [5]
    }
    assert after["0.bias"][5] == 7.0


def test_data_that_cannot_be_dealt_out_is_refused():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(range(8))

    from deepcompile.api import _dataloader
    from deepcompile.config import load_config

    settings = load_config({"train_micro_batch_size_per_gpu": 2}).with_batch(2)
    with pytest.raises(UserError, match="IterableDataset has no items by number"):
        _dataloader(Endless(), settings, Ranks(0, 2, torch.device("cpu")), None)
    loader = _dataloader(list(range(8)), settings, Ranks(1, 2, torch.device("cpu")), None)
    passes = [torch.cat(list(loader)).tolist() for _ in range(3)]
    assert len({tuple(each) for each in passes}) == 3 and all(len(set(p)) == 4 for p in passes)


def test_settings_that_an_argument_replaces_are_named():
    model = small()
    settings = config(scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 5}})
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    with pytest.warns(deepcompile.ConfigWarning) as caught:
        start(
            model,
            config=settings,
            optimizer=optimizer,
            model_parameters=list(model.parameters()),
            lr_scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o),
        )
    said = "\n".join(str(each.message) for each in caught)
    for what in ("optimizer: has no effect", "scheduler: has no effect", "model_parameters: have"):
        assert what in said


def test_reports_that_cannot_be_written(tmp_path):
    engine = start()
    for write in (engine.write_trace, engine.write_plan):
        with pytest.warns(UserWarning, match="no compiled step was traced yet"):
            assert write(tmp_path / "out") is None
    (tmp_path / "file").write_text("")
    for write in (engine.report, lambda p: engine.save_16bit_model(p)):
        with pytest.raises(UserError, match=r"cannot be written \(.*\)\. Choose another place"):
            write(tmp_path / "file" / "below")
