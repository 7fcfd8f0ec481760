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


def _named(name: str, ranks: Ranks) -> tuple[ByteDataset | None, str]:
    """The data set if every rank can read it, and what is used in words; collective."""
    problem, dataset = None, None
    try:
        dataset = load_dataset(name, limit_bytes=LIMIT_BYTES)
    except Exception as error:  # any of a hub's many ways to be out of reach
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    problems = [p for p in ranks.gather(problem) if p]
    if not problems:
        return dataset, name
    said = f"text of {local_text().source}, as {name} cannot be read ({problems[0]})"
    if ranks.rank == 0:
        print(f"[bench] data: {said}", flush=True)
    return None, said


def training_batches(
    name: str | None, vocabulary: int, batch: int, sequence: int, seed: int, ranks: Ranks
) -> tuple[Batches, str]:
    """This rank's endless batches on the CPU, and where the text is from. Collective."""
    dataset, source = _named(name, ranks) if name else (None, f"text of {local_text().source}")
    row = local_tokens(vocabulary) if dataset is None else tokens(dataset.train, vocabulary)
    return Batches(row, batch, sequence, seed=seed, rank=ranks.rank, world=ranks.world), source
