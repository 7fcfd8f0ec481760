# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that were damaged or are another model's, and saves that fail: what is said, and
what is left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections import namedtuple

import numpy as np
import pytest
import torch
from test_checkpoint import META, ONE, save, shards, values
from test_engine import error_of, small, start, step
from torch import nn

from deepcompile import UserError, checkpoint, checkpoint_files, errors


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def parts_of(engine) -> dict:
    return {(p["member"], p["start"]): p["weight"].clone() for p in engine.runtime.pieces()}


FILES = ["__0_0.distcp", "rng_0.pt", "client_state.pt", "extra_state.pt", "meta.pt", ".metadata"]


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_before_anything_is_overwritten(tmp_path, name):
    engine = start()
    step(engine)
    folder = engine.save_checkpoint(tmp_path)
    path, good = folder / name, (folder / name).read_bytes()
    before, number = parts_of(engine), engine.global_steps
    for spoil, cause in [
        (cut, f"has {len(good) - 9} bytes, and {len(good)} were saved"),
        (flip, "its checksum is not the one that was saved"),
        (os.unlink, "no complete checkpoint" if name in ("meta.pt", ".metadata") else "is missing"),
    ]:
        spoil(path)
        said = error_of(lambda: engine.load_checkpoint(tmp_path))
        assert cause in said and (name in said or "no complete" in said)
        path.write_bytes(good)
    assert engine.global_steps == number
    assert all(torch.equal(part, before[key]) for key, part in parts_of(engine).items())
    engine.load_checkpoint(tmp_path)


def test_large_files_are_added_up_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "_PIECE", 8)
    (tmp_path / "x").write_bytes(bytes(range(30)))
    first = checkpoint_files.sums_of([tmp_path / "x"])
    assert first["x"][0] == 30
    for at in (0, 8, 29):
        data = bytearray(range(30))
        data[at] ^= 1
        (tmp_path / "x").write_bytes(data)
        assert checkpoint_files.sums_of([tmp_path / "x"]) != first
    (tmp_path / "x").write_bytes(b"")
    assert checkpoint_files.sums_of([tmp_path / "x"]) == {"x": [0, 0]}


def test_sums_that_are_gone_or_no_use_are_named(tmp_path):
    engine = start()
    sums = engine.save_checkpoint(tmp_path) / "sums.json"
    sums.write_text("[")
    assert "sums.json: cannot be read" in error_of(lambda: engine.load_checkpoint(tmp_path))
    sums.unlink()
    assert "sums.json: is missing" in error_of(lambda: engine.load_checkpoint(tmp_path))


class WithBuffer(nn.Module):
    def __init__(self, **buffers: int):
        super().__init__()
        self.inner = small()
        for name, size in buffers.items():
            self.register_buffer(name, torch.zeros(size))

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    ("mine", "expected"),
    [
        ({"mean": 3, "new": 2}, "has no buffer new; it is of another model"),
        ({"renamed": 3}, "has no buffer renamed"),
        ({}, "has a buffer mean that this model lacks"),
        ({"mean": 4}, "buffer mean has shape [3] there, [4] here"),
    ],
)
def test_buffers_of_another_model(tmp_path, mine, expected):
    start(WithBuffer(mean=3)).save_checkpoint(tmp_path)
    other = start(WithBuffer(**mine))
    assert expected in error_of(lambda: other.load_checkpoint(tmp_path))


def test_a_modules_own_state_that_is_not_there(tmp_path):
    class Keeps(WithBuffer):
        def get_extra_state(self):
            return 1

        def set_extra_state(self, state):
            pass

    start(WithBuffer()).save_checkpoint(tmp_path, tag="without")
    start(Keeps()).save_checkpoint(tmp_path, tag="with")
    said = error_of(lambda: start(Keeps()).load_checkpoint(tmp_path, tag="without"))
    assert "has no module's state _extra_state" in said
    said = error_of(lambda: start(WithBuffer()).load_checkpoint(tmp_path, tag="with"))
    assert "has a module's state _extra_state that this model lacks" in said


def test_causes_without_a_text_have_their_type():
    failures = {0: (EOFError(), None), 1: (RuntimeError("cut off"), None)}
    error = checkpoint.dcp.api.CheckpointException("load", failures)
    assert checkpoint._causes(error) == "rank 0: EOFError; rank 1: RuntimeError: cut off"


# ---- saves that fail


@pytest.mark.parametrize("place", ["sums", "rng", "meta"])
def test_a_save_that_fails_leaves_no_files(tmp_path, monkeypatch, place):
    save(tmp_path, "good", fill=1.0)

    def fail(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos 1 vs 2")

    if place == "sums":
        monkeypatch.setattr(checkpoint.files, "write_sums", fail)
    elif place == "rng":
        monkeypatch.setattr(checkpoint, "rng_state", fail)
    else:
        monkeypatch.setattr(checkpoint.torch, "save", fail)
        monkeypatch.setattr(checkpoint, "check_readable", lambda *args: None)
    room = namedtuple("Usage", "total used free")(2**30, 2**30, 2**20)
    monkeypatch.setattr(errors.shutil, "disk_usage", lambda path: room)
    with pytest.raises(UserError, match=r"unexpected pos 1 vs 2; 1\.0 MiB are free there; choose"):
        save(tmp_path, "next", fill=2.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good", "latest"]


def test_a_tag_whose_replacement_fails_is_put_back(tmp_path, monkeypatch):
    save(tmp_path, fill=1.0)
    rename = checkpoint.Path.rename

    def fail(path, target):
        if path.name == "one.tmp":  # DCP's metadata has its own
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(checkpoint.Path, "rename", fail)
    with pytest.raises(UserError, match="could not be written: no; choose"):
        save(tmp_path, fill=2.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "one"]
    read = shards(5, fill=0.0)
    checkpoint.read_tensors(checkpoint.find(tmp_path, None, ONE), read, ONE)
    assert values(read) == [1.0] * 10


def test_what_dead_saves_left_goes_with_the_next(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    here = checkpoint_files._here()
    for name, owner in {
        "dead": {"host": here, "pid": ended.pid},
        "mine": {"host": here, "pid": os.getpid()},
        "busy": {"host": here, "pid": os.getppid()},
        "idle-elsewhere": {"host": "node-7", "pid": 1},
        "elsewhere": {"host": "node-7", "pid": 1},
        "users": None,
    }.items():
        folder = tmp_path / f"{name}.tmp"
        folder.mkdir()
        if owner is not None:
            (folder / ".owner").write_text(json.dumps(owner))
    os.utime(tmp_path / "idle-elsewhere.tmp" / ".owner", (1e9, 1e9))
    folder = save(tmp_path)
    left = sorted(p.name for p in tmp_path.glob("*.tmp"))
    assert left == ["busy.tmp", "elsewhere.tmp", "users.tmp"]
    assert not (folder / ".owner").exists()


@pytest.mark.parametrize("name", ["model.bin", "model.safetensors"])
def test_a_model_that_cannot_be_written_leaves_no_file(tmp_path, monkeypatch, name):
    saver = torch if name.endswith(".bin") else pytest.importorskip("safetensors.torch")
    engine = start()

    def fail(state, path, *args):
        path.write_bytes(b"half")
        raise RuntimeError("unexpected pos 704 vs 598")

    monkeypatch.setattr(saver, "save" if saver is torch else "save_file", fail)
    said = error_of(lambda: engine.save_16bit_model(tmp_path, name))
    assert said.startswith(f"[checkpoint] {tmp_path / name}: cannot be written (unexpected pos 704")
    assert list(tmp_path.iterdir()) == []


def test_room_is_spoken_of_where_it_may_be_the_cause(tmp_path, monkeypatch):
    room = namedtuple("Usage", "total used free")(2**40, 2**40, 3 * 2**20)
    monkeypatch.setattr(errors.shutil, "disk_usage", lambda path: room)
    full = OSError(28, "No space left on device")
    assert errors.why_not_written(tmp_path, full).endswith("device; 3.0 MiB are free there")
    assert errors.why_not_written(tmp_path, OSError(13, "Permission denied")) == "Permission denied"
    monkeypatch.setattr(errors.shutil, "disk_usage", lambda path: room._replace(free=2**40))
    assert errors.why_not_written(tmp_path, RuntimeError("x\ny")) == "x"


# ---- what is not a tensor


def optimizer_of(**extra):
    model = small()
    groups = [{"params": list(model.parameters()), **extra}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    settings = {"train_batch_size": 4}
    return start(model, config=settings, optimizer=optimizer)


@pytest.mark.parametrize("value", [len, object(), namedtuple("Pair", "a b")(1, 2), [1, {"x": len}]])
def test_a_groups_value_that_could_not_be_loaded_is_not_saved(tmp_path, value):
    engine = optimizer_of(tag=value)
    said = error_of(lambda: engine.save_checkpoint(tmp_path))
    where = "['tag'][1]['x']" if isinstance(value, list) else "['tag']"
    assert f"optimizer.param_groups[0]{where}: an object of " in said
    assert list(tmp_path.iterdir()) == []


def test_a_groups_other_values_come_back(tmp_path):
    table = np.arange(6, dtype="int16").reshape(2, 3)[:, ::-1]
    optimizer_of(table=table, words={"a"}, kept=frozenset([2])).save_checkpoint(tmp_path)
    other = optimizer_of(table=None, words=None, kept=None)
    other.load_checkpoint(tmp_path)
    (group,) = other.optimizer.param_groups
    assert group["table"].dtype == table.dtype and np.array_equal(group["table"], table)
    assert group["words"] == {"a"} and group["kept"] == frozenset([2])


def test_client_state_that_cannot_be_kept_is_named(tmp_path):
    engine = start()
    said = error_of(lambda: engine.save_checkpoint(tmp_path, client_state={"a": {"f": lambda: 0}}))
    assert "[checkpoint] client_state['a']['f']: an object of builtins.function cannot be" in said
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="client_state: must be a dict, not list"):
        from deepcompile import engine_state

        engine_state.save(engine, tmp_path, None, [1])


def test_meta_is_what_it_was(tmp_path):
    shutil.rmtree(tmp_path)
    folder = save(tmp_path)  # whose parents are made
    assert checkpoint.read_meta(folder)[0] == {"format": checkpoint.FORMAT, **META}
