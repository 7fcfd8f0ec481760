# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of several ranks: whose values are kept, and that all ranks hear of what is wrong
on one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import run_ranks


def _engine():
    import torch

    import deepcompile

    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    for i in range(4):
        model.register_buffer(f"b{i}", torch.zeros(4 + i))
    config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW"},
              "zero_optimization": {"stage": 3}}  # fmt: skip
    return deepcompile.initialize(model=model, config=config)[0]


def _error(work) -> str:
    import deepcompile

    try:
        work()
    except deepcompile.UserError as error:
        return str(error)
    return "no error"


def _buffers(rank: int, world: int, folder: str) -> list[float]:
    import torch

    engine = _engine()
    with torch.no_grad():
        for i in range(4):
            getattr(engine.module, f"b{i}").fill_(rank + 1.0)
    engine.save_checkpoint(folder)
    engine.load_checkpoint(folder)
    return [getattr(engine.module, f"b{i}")[0].item() for i in range(4)]


def test_buffers_are_rank_0s(tmp_path):
    assert run_ranks(_buffers, 2, str(tmp_path), timeout=60) == [[1.0] * 4] * 2


def _mistakes(rank: int, world: int, folder: str) -> list[str]:
    from deepcompile import engine_state

    engine = _engine()
    odd = [1] if rank else {}
    said = [
        _error(lambda: engine.save_checkpoint(folder, tag=f"x{rank}")),
        _error(lambda: engine.save_checkpoint(folder, tag="x" if rank else "x.tmp")),
        _error(lambda: engine_state.save(engine, folder, "x", odd)),
        _error(lambda: engine.save_checkpoint(folder, client_state={"f": lambda: 0})),
    ]
    engine.ranks.barrier()  # rank 0 removes what was written
    assert not list(Path(folder).iterdir())
    engine.save_checkpoint(folder, tag="good")
    said.append(_error(lambda: engine.load_checkpoint(folder, tag="good" if rank else None)))
    return said


def test_a_mistake_on_one_rank_is_heard_on_all(tmp_path):
    for said in run_ranks(_mistakes, 2, str(tmp_path), timeout=60):
        assert "tag 'x0': is rank 0's, and rank 1 gave 'x1'; give all ranks one tag" in said[0]
        assert "tag 'x.tmp': must be a plain folder name" in said[1]
        assert "client_state: must be a dict, not list" in said[2]
        assert "client_state['f']: an object of builtins.function cannot be saved" in said[3]
        assert "tag None: is rank 0's, and rank 1 gave 'good'" in said[4]


def _load_damaged(rank: int, world: int, folder: str, name: str, what: str) -> tuple[str, bool]:
    import torch

    engine = _engine()
    engine.save_checkpoint(folder)
    path = Path(folder) / "global_step0" / name
    if rank == 0:
        if what == "flip":
            data = bytearray(path.read_bytes())
            data[-40] ^= 1
            path.write_bytes(data)
        else:
            sums = path.with_name("sums.json")  # which would tell of it first
            kept = {k: v for k, v in json.loads(sums.read_text()).items() if k != name}
            sums.write_text(json.dumps(kept))
            path.write_bytes(path.read_bytes()[:200])
    engine.ranks.barrier()
    engine = _engine()
    before = [p["weight"].fill_(3.0).clone() for p in engine.runtime.pieces()]
    said = _error(lambda: engine.load_checkpoint(folder))
    now = [p["weight"] for p in engine.runtime.pieces()]
    return said, all(torch.equal(a, b) for a, b in zip(before, now, strict=True))


@pytest.mark.parametrize("name", ["rng_1.pt", "__1_0.distcp"])
def test_a_damaged_part_is_an_error_on_every_rank_before_anything_is_changed(tmp_path, name):
    for said, unchanged in run_ranks(_load_damaged, 2, str(tmp_path), name, "flip", timeout=60):
        assert f"{name}: its checksum is not the one" in said and unchanged


def test_generators_are_read_before_anything_is_changed(tmp_path):
    args = (str(tmp_path), "rng_1.pt", "cut")
    for said, unchanged in run_ranks(_load_damaged, 2, *args, timeout=60):
        assert "rng_1.pt: cannot be read: RuntimeError" in said and unchanged
