# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders: what is written, what is refused, and that a failed save harms nothing."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from deepcompile import UserError, checkpoint
from deepcompile.checkpoint_tensors import FlatShard
from deepcompile.distributed import Ranks

ONE = Ranks(0, 1, torch.device("cpu"))
META = {"shapes": {"w": [2, 5]}}


def shards(split: int, fill: float | None = None) -> dict[str, FlatShard]:
    """Ten elements in two chunks, at `split`: 0 .. 9, or all `fill`."""
    data = torch.arange(10.0) if fill is None else torch.full((10,), fill)
    shard = FlatShard(10, torch.float32)
    shard.add(0, data[:split])
    shard.add(split, data[split:])
    return {"master.w": shard}


def values(tensors) -> list[float]:
    chunks = tensors["master.w"].chunks
    return torch.cat([chunks[start] for start in sorted(chunks)]).tolist()


def save(root, tag="one", fill=None, **kwargs):
    client = kwargs.pop("client_state", {})
    arguments = {"meta": META, "pickled": {"client": client, "extra": {}}} | kwargs
    return checkpoint.save(root, tag, shards(7, fill), ranks=ONE, **arguments)


def test_other_cuts_read_the_same_values(tmp_path):
    folder = save(tmp_path, client_state={"epoch": 2})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "one"]
    other = shards(3, fill=-1.0)
    checkpoint.read_tensors(folder, other, ONE)
    assert values(other) == list(range(10))
    meta, client, _ = checkpoint.read_meta(folder)
    assert meta["shapes"] == META["shapes"] and client == {"epoch": 2}


def test_latest_and_tags(tmp_path):
    assert checkpoint.find(tmp_path, None, ONE) is None
    save(tmp_path, "one")
    save(tmp_path, "two")
    assert checkpoint.find(tmp_path, None, ONE).name == "two"
    assert checkpoint.find(tmp_path, "one", ONE).name == "one"
    with pytest.raises(UserError, match=r"three: no complete checkpoint.*\['one', 'two'\]"):
        checkpoint.find(tmp_path, "three", ONE)


def test_same_tag_again_replaces_it(tmp_path):
    save(tmp_path, fill=1.0)
    folder = save(tmp_path, fill=2.0)
    read = shards(5, fill=0.0)
    checkpoint.read_tensors(folder, read, ONE)
    assert values(read) == [2.0] * 10
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "one"]


@pytest.mark.parametrize("place", ["dcp", "meta", "rename", "latest"])
def test_a_save_that_fails_leaves_the_last_one(tmp_path, monkeypatch, place):
    save(tmp_path, "good", fill=1.0)

    def fail(*args, **kwargs):
        raise OSError("disk is full")

    if place == "dcp":
        monkeypatch.setattr(checkpoint.dcp, "save", fail)
    elif place == "meta":
        monkeypatch.setattr(checkpoint.torch, "save", fail)
    elif place == "rename":
        monkeypatch.setattr(checkpoint.Path, "rename", fail)
    else:
        monkeypatch.setattr(checkpoint.os, "replace", fail)
    with pytest.raises((OSError, UserError), match="disk is full"):
        save(tmp_path, "next", fill=2.0)
    monkeypatch.undo()
    folder = checkpoint.find(tmp_path, None, ONE)
    assert folder.name == "good"
    read = shards(5, fill=0.0)
    checkpoint.read_tensors(folder, read, ONE)
    assert values(read) == [1.0] * 10
    save(tmp_path, "next", fill=3.0)  # and the remains are no obstacle
    assert checkpoint.find(tmp_path, None, ONE).name == "next"


def test_death_between_the_renames_of_one_tag(tmp_path):
    folder = save(tmp_path, fill=1.0)
    folder.rename(tmp_path / "one.old")
    assert checkpoint.find(tmp_path, None, ONE).name == "one.old"


def test_truncated_files_are_errors(tmp_path):
    folder = save(tmp_path)
    data = next(folder.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:20])
    with pytest.raises(UserError, match="could not be loaded"):
        checkpoint.read_tensors(folder, shards(5), ONE)
    (folder / "meta.pt").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.read_meta(folder)


def test_missing_tensor_is_an_error(tmp_path):
    folder = save(tmp_path)
    with pytest.raises(UserError, match="(?s)could not be loaded.*master.x"):
        checkpoint.read_tensors(folder, {"master.x": shards(5)["master.w"]}, ONE)


@pytest.mark.parametrize("tag", ["", "..", "a/b", "latest", "x.tmp", "best.old"])
def test_bad_tags(tmp_path, tag):
    with pytest.raises(UserError, match="must be a plain folder name"):
        save(tmp_path, tag)
    with pytest.raises(UserError, match="must be a plain folder name"):
        checkpoint.find(tmp_path, tag, ONE)


@pytest.mark.parametrize(
    ("mine", "expected"),
    [
        ({"w": [5, 2]}, r"parameter w has shape \[2, 5\] there, \[5, 2\] here"),
        ({"w": [2, 5], "b": [5]}, "has no parameter b; it is of another model"),
        ({}, "has a parameter w that this model lacks"),
    ],
)
def test_other_models(tmp_path, mine, expected):
    with pytest.raises(UserError, match=expected):
        checkpoint.check_shapes(tmp_path, META["shapes"], mine)


def test_generators_go_on(tmp_path):
    folder = save(tmp_path)

    def draw():
        return torch.rand(2).tolist(), random.random(), np.random.rand()

    first = draw()
    checkpoint.set_rng_state(checkpoint.read_rng(folder, ONE, 1), ONE.device)
    assert draw() == first
    other = Ranks(3, 4, torch.device("cpu"))
    with pytest.warns(UserWarning, match="rank 3 keeps its own random state"):
        assert checkpoint.read_rng(folder, other, 1) is None
    with pytest.raises(UserError, match="rng_3.pt: is missing, and 4 ranks saved"):
        checkpoint.read_rng(folder, other, 4)
    (folder / "rng_0.pt").write_bytes((folder / "rng_0.pt").read_bytes()[:100])
    with pytest.raises(UserError, match=r"rng_0.pt: cannot be read: .*load another tag"):
        checkpoint.read_rng(folder, ONE, 1)
