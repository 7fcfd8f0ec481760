# SPDX-License-Identifier: Apache-2.0
"""Datasets: what is read, how it is split, who sees which window, and resuming."""

from __future__ import annotations

import json
import pickle
import sys

import pytest
import torch

from deepcompile import data


@pytest.fixture
def folder(tmp_path):
    for number in range(40):
        name = f"pkg{number % 3}/file{number:02}.py"
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes([number]) * 256)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "skipped.py").write_bytes(b"\xff" * 256)
    (tmp_path / "notes.txt").write_bytes(b"\xfe" * 256)
    return tmp_path


def test_default_text_is_the_standard_library():
    dataset = data.read_folder(limit_bytes=1 << 20)
    assert dataset.train.dtype == torch.uint8
    total = dataset.train.numel() + dataset.validation.numel()
    assert abs(total - (1 << 20)) < 2 * dataset.documents
    assert "import" in data.decode(dataset.train[:200_000].tolist())


def test_files_are_split_by_path_and_never_shared(folder):
    dataset = data.read_folder(folder, validation=0.3)
    assert dataset.documents == 40
    train, held = set(dataset.train.tolist()), set(dataset.validation.tolist())
    assert train & held <= {ord("\n")}
    assert not {0xFE, 0xFF} & (train | held)
    (folder / "pkg0" / "another.py").write_bytes(b"\xaa" * 256)
    grown = data.read_folder(folder, validation=0.3)
    assert held <= set(grown.validation.tolist())


def test_ranks_share_an_epoch_without_overlap(folder):
    dataset = data.read_folder(folder, validation=0.0)
    per_rank = [dataset.batches(2, 64, seed=3, rank=r, world=4) for r in range(4)]
    one = dataset.batches(8, 64, seed=3)
    assert per_rank[0].batches_per_epoch == one.batches_per_epoch
    for _ in range(one.batches_per_epoch + 2):
        together = torch.cat([next(b)["input_ids"] for b in per_rank])
        assert torch.equal(together, next(one)["input_ids"])


def test_windows_do_not_return_within_an_epoch_and_epochs_differ():
    tokens = torch.arange(250, dtype=torch.uint8)
    batches = data.Batches(tokens, 5, 10)
    epochs = []
    for _ in range(2):
        rows = [next(batches)["input_ids"] for _ in range(batches.batches_per_epoch)]
        epochs.append(torch.cat(rows)[:, 0].tolist())
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(0, 250, 10))
    assert epochs[0] != epochs[1]


def test_batches_have_the_form_of_a_causal_model(folder):
    batch = next(data.read_folder(folder).batches(3, 32))
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].shape == (3, 32)
    assert batch["input_ids"].dtype == torch.int64
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert batch["labels"].data_ptr() != batch["input_ids"].data_ptr()


def test_resumed_batches_go_on_where_the_others_stopped(folder):
    dataset = data.read_folder(folder)
    whole = dataset.batches(2, 64, seed=5, rank=1, world=2)
    for _ in range(7):
        next(whole)
    resumed = dataset.batches(2, 64, seed=5, rank=1, world=2)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for _ in range(whole.batches_per_epoch):
        assert torch.equal(next(whole)["input_ids"], next(resumed)["input_ids"])
    other = dataset.batches(2, 64, seed=6)
    with pytest.raises(ValueError, match="seed 5, not 6"):
        other.load_state_dict(whole.state_dict())


def test_other_ranks_go_on_behind_all_that_was_read():
    tokens = torch.arange(6 * 40)

    def read(world, batch_size, steps, state=None):
        """Windows that all ranks get, and the state after them."""
        found = []
        for rank in range(world):
            batches = data.Batches(tokens, batch_size, 6, seed=3, rank=rank, world=world)
            if state is not None:
                batches.load_state_dict(state)
            for _ in range(steps):
                found += (next(batches)["input_ids"][:, 0] // 6).tolist()
        return sorted(found), batches.state_dict()

    first, state = read(4, 2, 2)
    for world, batch_size, steps in ((2, 2, 6), (1, 8, 3), (8, 1, 3), (4, 2, 3)):
        rest, _ = read(world, batch_size, steps, state)
        assert len(rest) == 24 and not set(rest) & set(first), (world, batch_size)
    with pytest.raises(ValueError, match="16 sequences of the saved epoch were read"):
        read(3, 1, 1, state)
    with pytest.raises(ValueError, match="in sequences of 6 tokens, not 5"):
        data.Batches(tokens, 2, 5, seed=3).load_state_dict(state)
    # What older versions saved goes on as it did.
    old, _ = read(4, 2, 3, {"position": 2, "seed": 3})
    assert old == read(4, 2, 3, state)[0]


def test_text_returns_from_tokens():
    assert data.decode(data.encode("def f(): # ä").tolist()) == "def f(): # ä"
    assert data.decode([0xFF, 0x41]) == "\ufffdA"


def test_bad_arguments_are_named(tmp_path, folder):
    dataset = data.read_folder(folder)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        data.read_folder(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"no text with suffix \.rs"):
        data.read_folder(folder, suffixes=(".rs",))
    with pytest.raises(ValueError, match="rank 2 is not in a world of 2"):
        dataset.batches(1, 8, rank=2, world=2)
    with pytest.raises(ValueError, match="use more text"):
        dataset.batches(4096, 64)
    with pytest.raises(ValueError, match="split 'test'"):
        dataset.batches(1, 8, split="test")


def test_masks_that_mask_nothing_are_left_out():
    ids = torch.arange(6)
    sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded = {"input_ids": ids, "attention_mask": torch.tensor([0, 1, 1, 1, 1, 1])}
    collate = pickle.loads(pickle.dumps(data.without_full_masks()))  # as a loader's worker gets it
    assert list(collate([sample, sample])) == ["input_ids"]
    torch.testing.assert_close(collate([sample, padded])["attention_mask"][1], torch.tensor(
        [0, 1, 1, 1, 1, 1]))  # fmt: skip
    assert data.without_full_masks(lambda rows: rows)([1, 2]) == [1, 2]  # no batch of names
    four = {"attention_mask": torch.ones(1, 1, 6, 6)}  # no padding mask: not ours to judge
    assert data.without_full_masks(lambda rows: four)([]) is four


def test_datasets_library_absent_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        data.load_dataset("some/name")


def test_local_jsonl_through_the_datasets_library(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {n} " * 20}) + "\n" for n in range(50)))
    dataset = data.load_dataset(str(path), validation=0.2)
    assert dataset.documents == 50
    assert data.decode(dataset.train[:4].tolist()) == "row "
    assert dataset.validation.numel() > 0
    with pytest.raises(ValueError, match="no column 'body'"):
        data.load_dataset(str(path), column="body")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        data.load_dataset(str(tmp_path / "absent.jsonl"))
