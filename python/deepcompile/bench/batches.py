# SPDX-License-Identifier: Apache-2.0
"""What the benchmark trains on: the same batches for every framework.

Without a tokenizer, text becomes tokens by itself: each byte is one where the
model's vocabulary is small, and where it is large each word is, numbered by how
often it occurs, so that the rows of the embedding are used as unevenly as a
tokenizer's would be. All sequences are full: no padding, no mask.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import dataclass

import torch

from ..data import Batches, ByteDataset, load_dataset, read_folder
from ..distributed import Ranks

WORDS_FROM = 4096
"""The vocabulary's size from which tokens are words."""
LIMIT_BYTES = 8 << 20
_WORD = re.compile(rb"\w+|\s+|[^\w\s]")


@functools.lru_cache(maxsize=1)
def local_text() -> ByteDataset:
    """Read once a process."""
    return read_folder(limit_bytes=LIMIT_BYTES)


def tokens(text: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """1-D uint8 text to 1-D int32 tokens below `vocabulary`."""
    if vocabulary < WORDS_FROM:
        return text.to(torch.int32) % vocabulary
    words = _WORD.findall(text.numpy().tobytes())
    common = Counter(words).most_common()
    numbers = {word: min(n, vocabulary - 1) for n, (word, _) in enumerate(common)}
    return torch.tensor([numbers[word] for word in words], dtype=torch.int32)


@functools.lru_cache(maxsize=2)
def local_tokens(vocabulary: int) -> torch.Tensor:
    """Of the local text; conditions of one process share them."""
    return tokens(local_text().train, vocabulary)


@dataclass(frozen=True)
class Text:
    """What is trained on."""

    source: str
    """In words."""
    named: ByteDataset | None = None
    """None: local text."""
    problem: str = ""
    """Why it is not what was asked for."""

    def facts(self) -> dict[str, str]:
        """For the row."""
        return {"data": self.source} | ({"data_problem": self.problem} if self.problem else {})


_unreadable: dict[str, str] = {}
"""Data sets that some rank could not read in this process, and why: it takes long to find out."""


def named_text(name: str | None, problem: str, ranks: Ranks) -> Text:
    """The data set if every rank can read it, else local text; collective. `problem`: why it cannot
    be read, if that is known."""
    if not name:
        return Text(f"text of {local_text().source}")
    problem = problem or _unreadable.get(name, "")
    if not problem:
        dataset, mine = None, None
        try:
            dataset = load_dataset(name, limit_bytes=LIMIT_BYTES)
        except Exception as error:  # any of a hub's many ways to be out of reach
            mine = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        problem = next((p for p in ranks.gather(mine) if p), "")
        if not problem:
            return Text(name, dataset)
        _unreadable[name] = problem
    said = f"text of {local_text().source}, as {name} cannot be read ({problem})"
    if ranks.rank == 0:
        print(f"[bench] data: {said}", flush=True)
    return Text(said, None, problem)


def training_batches(
    text: Text, vocabulary: int, batch: int, sequence: int, seed: int, ranks: Ranks
) -> Batches:
    """This rank's endless batches on the CPU."""
    row = local_tokens(vocabulary) if text.named is None else tokens(text.named.train, vocabulary)
    return Batches(row, batch, sequence, seed=seed, rank=ranks.rank, world=ranks.world)
