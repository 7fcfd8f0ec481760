# SPDX-License-Identifier: Apache-2.0
"""Small datasets for examples and tests: bytes of text files, cut into windows.

``ByteDataset`` needs no tokenizer and no download: each byte is a token (256 in
all), and its default text is the Python standard library's own sources.
``load_dataset`` reads a Hugging Face dataset into the same form.

The order is a function of (seed, position) alone: ranks take disjoint windows
of one shuffled order, whatever their number a window is seen once an epoch, and
``state_dict`` holds the position, so that a resumed run goes on with the batch
that the interrupted one would have read next.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 256
_SEPARATOR = b"\n\n"


@dataclass(frozen=True)
class ByteDataset:
    """Tokens in one row, split by document into a training and a validation part."""

    train: torch.Tensor
    """Tokens to learn from: 1-D uint8."""
    validation: torch.Tensor
    """Tokens never trained on: 1-D uint8."""
    source: str
    """Where the text comes from."""
    documents: int = field(default=0)
    """How many documents were read."""

    def batches(
        self,
        batch_size: int,
        sequence: int,
        *,
        split: str = "train",
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> Batches:
        """Batches of this rank: see ``Batches``."""
        if split not in ("train", "validation"):
            raise ValueError(f"[data] split {split!r}: use 'train' or 'validation'")
        tokens = self.train if split == "train" else self.validation
        return Batches(tokens, batch_size, sequence, seed=seed, rank=rank, world=world)


class Batches(Iterator[dict[str, torch.Tensor]]):
    """Endless batches of ``{"input_ids", "labels"}``, int64 of shape (batch, sequence).

    Labels equal the inputs: Hugging Face causal models shift them themselves.
    """

    def __init__(
        self,
        tokens: torch.Tensor,
        batch_size: int,
        sequence: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"[data] rank {rank} is not in a world of {world}")
        if batch_size < 1 or sequence < 2:
            raise ValueError(
                f"[data] batch size {batch_size} and sequence {sequence}: use at least 1 and 2"
            )
        self._tokens = tokens
        self._batch_size, self._sequence = batch_size, sequence
        self._seed, self._rank, self._world = seed, rank, world
        self._windows = tokens.numel() // sequence
        needed = batch_size * world
        if self._windows < needed:
            raise ValueError(
                f"[data] {tokens.numel()} tokens give {self._windows} windows of {sequence}, but "
                f"one batch of {batch_size} on {world} ranks takes {needed}: use more text"
            )
        self._position = 0  # batches this rank has handed out
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    @property
    def batches_per_epoch(self) -> int:
        """Batches each rank sees before a window comes back."""
        return self._windows // (self._batch_size * self._world)

    def __next__(self) -> dict[str, torch.Tensor]:
        epoch, step = divmod(self._position, self.batches_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._order = torch.randperm(self._windows, generator=generator)
            self._epoch = epoch
        first = (step * self._world + self._rank) * self._batch_size
        windows = self._order[first : first + self._batch_size].tolist()
        rows = [self._tokens[w * self._sequence : (w + 1) * self._sequence] for w in windows]
        input_ids = torch.stack(rows).to(torch.int64)
        self._position += 1
        return {"input_ids": input_ids, "labels": input_ids.clone()}

    def state_dict(self) -> dict[str, int]:
        """The position, to go on from after a restart."""
        return {
            "position": self._position, "seed": self._seed, "batch_size": self._batch_size,
            "world": self._world, "sequence": self._sequence,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batch that ``state`` was taken at, also on another number of ranks or
        with other batches: behind all that was handed out on all ranks in its epoch."""
        if state["seed"] != self._seed:
            raise ValueError(
                f"[data] the saved position belongs to seed {state['seed']}, not {self._seed}: "
                f"use the same seed to resume"
            )
        if state.get("sequence", self._sequence) != self._sequence:
            raise ValueError(
                f"[data] the saved position is in sequences of {state['sequence']} tokens, not "
                f"{self._sequence}: use the same length to resume"
            )
        at_once = self._batch_size * self._world
        then = state.get("batch_size", self._batch_size) * state.get("world", self._world)
        epoch, step = divmod(int(state["position"]), self._windows // then)
        if step * then % at_once:
            raise ValueError(
                f"[data] {step * then} sequences of the saved epoch were read, which batches of "
                f"{self._batch_size} on {self._world} ranks do not end at: use sizes that do"
            )
        step = min(step * then // at_once, self.batches_per_epoch)
        self._position = epoch * self.batches_per_epoch + step


def read_folder(
    folder: str | os.PathLike[str] | None = None,
    *,
    suffixes: tuple[str, ...] = (".py",),
    limit_bytes: int = 8 << 20,
    validation: float = 0.05,
) -> ByteDataset:
    """A dataset of the text files under ``folder`` (default: this Python's standard library).

    Files are read in the order of their paths, installed packages, tests and
    generated tables left out, until ``limit_bytes`` are taken. A file belongs to the
    validation part by a hash of its path, so that it stays there when others come or go.
    """
    root = Path(folder) if folder is not None else Path(sysconfig.get_paths()["stdlib"])
    if not root.is_dir():
        raise FileNotFoundError(f"[data] {root} is no folder: name one with text files in it")
    skipped = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"}
    documents: list[tuple[str, bytes]] = []
    taken = 0
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if path.suffix not in suffixes or skipped.intersection(relative.parts):
            continue
        if not path.is_file():
            continue
        content = path.read_bytes()[: limit_bytes - taken]
        if content:
            documents.append((relative.as_posix(), content))
            taken += len(content)
        if taken >= limit_bytes:
            break
    if not documents:
        raise FileNotFoundError(
            f"[data] {root} holds no text with suffix {' or '.join(suffixes)}: name another folder"
        )
    return _split(documents, validation, str(root))


def load_dataset(
    name_or_path: str,
    *,
    split: str = "train",
    column: str = "text",
    limit_bytes: int = 8 << 20,
    validation: float = 0.05,
) -> ByteDataset:
    """A Hugging Face dataset, or a local ``.jsonl``, ``.json``, ``.csv``, ``.parquet`` or
    ``.txt`` file read through that library, as bytes of its ``column``.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "[data] load_dataset needs the package 'datasets': pip install datasets, "
            "or use read_folder, which needs nothing"
        ) from error
    readers = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    readers[".txt"] = "text"
    path = Path(name_or_path)
    if path.suffix in readers:
        if not path.is_file():
            raise FileNotFoundError(f"[data] {path} does not exist")
        rows = datasets.load_dataset(readers[path.suffix], data_files=str(path), split=split)
    else:
        rows = datasets.load_dataset(name_or_path, split=split)
    if column not in rows.column_names:
        raise ValueError(
            f"[data] {name_or_path} has no column {column!r}: it has {rows.column_names}"
        )
    return _split(_take(rows, column, limit_bytes), validation, name_or_path)


def _take(rows: Iterable[dict], column: str, limit_bytes: int) -> list[tuple[str, bytes]]:
    """(key, content) of the first rows, up to ``limit_bytes`` together."""
    documents: list[tuple[str, bytes]] = []
    taken = 0
    for number, row in enumerate(rows):
        content = str(row[column]).encode("utf-8")[: limit_bytes - taken]
        if content:
            documents.append((f"row {number}", content))
            taken += len(content)
        if taken >= limit_bytes:
            break
    if not documents:
        raise ValueError(f"[data] column {column!r} holds no text")
    return documents


def _split(documents: list[tuple[str, bytes]], validation: float, source: str) -> ByteDataset:
    """Documents to two rows of tokens. At least one document goes to each part if there are two."""
    if not 0.0 <= validation < 1.0:
        raise ValueError(f"[data] validation share {validation}: use a number from 0 to below 1")
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    for key, content in documents:
        draw = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
        parts[draw < validation].append(content)
    if validation > 0 and len(documents) > 1:
        for empty in (True, False):
            if not parts[empty]:
                parts[empty].append(parts[not empty].pop())
    return ByteDataset(
        train=_tokens(parts[False]),
        validation=_tokens(parts[True]),
        source=source,
        documents=len(documents),
    )


def _tokens(contents: list[bytes]) -> torch.Tensor:
    joined = bytearray(_SEPARATOR.join(contents))
    return (
        torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)
    )


def _collate(collate: Callable[[list], Any], key: str, samples: list) -> Any:
    batch = collate(samples)
    mask = batch.get(key) if isinstance(batch, Mapping) else None
    if isinstance(mask, torch.Tensor) and mask.device.type == "cpu" and mask.dim() == 2:
        if bool((mask != 0).all()):
            return {name: value for name, value in batch.items() if name != key}
    return batch


def without_full_masks(
    collate_fn: Callable[[list], Any] | None = None, key: str = "attention_mask"
) -> Callable[[list], Any]:
    """`collate_fn` (default: torch's), which leaves out of its batch a mask of shape (batch,
    sequence) that masks no token. The result is the same and attention is faster, as a compiled
    model cannot look into a mask on the device. Done on the host, in the loader's workers."""
    if collate_fn is None:
        from torch.utils.data import default_collate

        collate_fn = default_collate
    return functools.partial(_collate, collate_fn, key)


def encode(text: str) -> torch.Tensor:
    """Text to tokens: 1-D int64."""
    return torch.tensor(list(text.encode("utf-8")), dtype=torch.int64)


def decode(tokens: Iterable[int]) -> str:
    """Tokens to text; bytes that are no UTF-8 show as the replacement mark."""
    return bytes(int(token) for token in tokens).decode("utf-8", errors="replace")
