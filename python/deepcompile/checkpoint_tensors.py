# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's tensors: the ranges of flattened tensors that a rank owns, and DCP's planners
that find them."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class FlatShard:
    """This rank's ranges [start, start + len) of a flattened tensor of `total` elements.

    Implements what DCP asks of an object that lists its own chunks; the planners
    below find their data. The ranges of all ranks tile the tensor.
    """

    def __init__(self, total: int, dtype: torch.dtype):
        self.total = total
        self.dtype = dtype
        self.chunks: dict[int, torch.Tensor] = {}

    def add(self, start: int, data: torch.Tensor) -> None:
        """`data`: 1-D view; loading writes into it."""
        if data.numel():
            self.chunks[start] = data.detach()

    def size(self) -> torch.Size:
        return torch.Size([self.total])

    def _chunk(self, start: int) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(
            offsets=torch.Size([start]), sizes=torch.Size([self.chunks[start].numel()])
        )

    def __create_write_items__(self, fqn: str, _object: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size([start])),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=self._chunk(start),
                    properties=TensorProperties(dtype=self.dtype),
                    size=self.size(),
                ),
            )
            for start in self.chunks
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk(start) for start in self.chunks]

    def chunk(self, index: MetadataIndex) -> torch.Tensor:
        """The data of one chunk, by where it starts."""
        return self.chunks[index.offset[0]]


class SavePlanner(DefaultSavePlanner):
    """DCP's own, which also finds the chunks of FlatShards."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict[index.fqn]
        return found.chunk(index) if isinstance(found, FlatShard) else super().lookup_object(index)


class LoadPlanner(DefaultLoadPlanner):
    """DCP's own, which also finds the chunks of FlatShards, for state dicts that are flat."""

    def __init__(self):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Any = None, is_coordinator: bool = False
    ) -> None:
        # The base class also looks for meta tensors to fill, and loses other objects there.
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        found = self.state_dict[index.fqn]
        return found.chunk(index) if isinstance(found, FlatShard) else super().lookup_tensor(index)
