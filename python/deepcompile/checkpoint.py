# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: one folder a tag, through torch.distributed.checkpoint (DCP).

A parameter is saved as its flattened fp32 master values and its two Adam
states; each rank writes the ranges it owns and reads the ranges it needs, so
any number of ranks can load what any other number saved. Layout:

    DIR/latest                 the newest complete tag
    DIR/TAG/*.distcp, .metadata   DCP: master.NAME, exp_avg.NAME, exp_avg_sq.NAME, buffer.NAME
    DIR/TAG/meta.pt            counters, schedule, parameter groups, shapes (rank 0)
    DIR/TAG/client_state.pt    whatever the user gave (rank 0)
    DIR/TAG/rng_R.pt           rank R's generators

Everything is written to TAG.tmp, which is renamed when complete; then `latest`
is replaced. A save that dies leaves the previous checkpoint as it was.
"""

from __future__ import annotations

import copy
import os
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from .distributed import Ranks
from .errors import UserError

FORMAT = 1


def _fail(what: str | Path, cause: str) -> UserError:
    return UserError(f"[checkpoint] {what}: {cause}")


def _causes(error: dcp.api.CheckpointException) -> str:
    """Each rank's own error, without the traceback."""
    return "; ".join(f"rank {rank}: {wrapped[0]}" for rank, wrapped in error.failures.items())


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


def rng_state(device: torch.device) -> dict[str, Any]:
    """This process's generators: torch, its device, Python and NumPy."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    try:
        import numpy as np
    except ImportError:
        return state
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state["numpy"] = (kind, torch.from_numpy(keys.astype("int64")), position, has_gauss, cached)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    if "numpy" in state:
        import numpy as np

        kind, keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype("uint32"), position, has_gauss, cached))


def _check_tag(tag: str) -> str:
    if not isinstance(tag, str):
        raise _fail(f"tag {tag!r}", f"must be text, not {type(tag).__name__}")
    if not tag or tag in (".", "..", "latest") or "/" in tag or os.sep in tag or tag[-4:] == ".tmp":
        raise _fail(f"tag {tag!r}", "must be a plain folder name, other than latest or *.tmp")
    return tag


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def plain(value: Any) -> Any:
    """Numbers of other libraries (NumPy's, in a learning rate) as Python's, in lists and dicts
    too, as a checkpoint is read without them."""
    if isinstance(value, dict):
        kept = copy.copy(value)
        kept.update({key: plain(each) for key, each in value.items()})
        return kept
    if isinstance(value, list) or type(value) is tuple:
        return type(value)(plain(each) for each in value)
    if isinstance(value, (int, float)) and type(value) not in (bool, int, float):
        return int(value) if isinstance(value, int) else float(value)
    if type(value).__module__ == "numpy" and hasattr(value, "item"):
        return value.item()
    return value


def _check_whole(root: Path, temporary: Path, world: int) -> None:
    """UserError unless every rank's part is in the folder."""
    there = {path.name for path in temporary.iterdir()}
    lacking = [rank for rank in range(world) if f"rng_{rank}.pt" not in there]
    written = dcp.FileSystemReader(temporary).read_metadata().storage_data or {}
    if not lacking and {each.relative_path for each in written.values()} <= there:
        return
    who = f"rank {lacking[0]}'s part" if lacking else "a part"
    raise _fail(
        root, f"{who} is not in it, but where that rank has a folder of this name. Give all ranks "
        "one folder that they share",
    )  # fmt: skip


def _publish(root: Path, tag: str, world: int) -> None:
    """Rename the complete TAG.tmp to TAG, then point `latest` at it."""
    temporary, final, old = root / f"{tag}.tmp", root / tag, root / f"{tag}.old"
    _check_whole(root, temporary, world)
    for path in temporary.iterdir():
        _sync_file(path)
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    temporary.rename(final)
    pointer = root / "latest.tmp"
    pointer.write_text(tag, encoding="utf-8")
    _sync_file(pointer)
    os.replace(pointer, root / "latest")
    _sync_file(root)
    shutil.rmtree(old, ignore_errors=True)


def save(
    root: str | Path,
    tag: str,
    tensors: dict[str, Any],
    meta: dict[str, Any],
    pickled: dict[str, dict[str, Any]],
    ranks: Ranks,
) -> Path:
    """Write one checkpoint; collective. `tensors`: FlatShards, and replicated tensors that
    rank 0 writes; `pickled`: "client" and "extra", which may be anything. Returns its folder."""
    root = Path(root)
    tag = ranks.from_first(_check_tag(tag))
    temporary = root / f"{tag}.tmp"

    def prepare() -> None:
        if ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            try:
                temporary.mkdir(parents=True)
            except OSError as error:
                raise _fail(root, f"cannot be written: {error}; choose another folder") from None

    def write_small() -> None:
        torch.save(rng_state(ranks.device), temporary / f"rng_{ranks.rank}.pt")
        if ranks.rank == 0:
            torch.save({"format": FORMAT, **meta}, temporary / "meta.pt")
            torch.save(pickled["client"], temporary / "client_state.pt")
            torch.save(pickled["extra"], temporary / "extra_state.pt")

    def publish() -> None:
        if ranks.rank == 0:
            _publish(root, tag, ranks.world)

    ranks.together("[checkpoint] save", prepare)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*no process group.*|.*single process.*")
            dcp.save(
                tensors,
                storage_writer=dcp.FileSystemWriter(temporary, single_file_per_rank=True),
                planner=SavePlanner(),
                process_group=ranks.group,
                no_dist=ranks.group is None,
            )
    except dcp.api.CheckpointException as error:
        raise _fail(temporary, f"could not be written: {_causes(error)}") from error
    ranks.together("[checkpoint] save", write_small)
    ranks.together("[checkpoint] save", publish)
    return root / tag


def find(root: str | Path, tag: str | None, ranks: Ranks) -> Path | None:
    """The folder to load, agreed by rank 0; None if `tag` is None and there is none yet."""
    root = Path(root)

    def choose() -> Path | None:
        wanted = tag
        if wanted is None:
            try:
                wanted = (root / "latest").read_text(encoding="utf-8").strip()
            except FileNotFoundError:
                return None
            except OSError as error:
                raise _fail(root, f"cannot be read: {error}; give the folder that was saved "
                            "to") from None  # fmt: skip
        for folder in (root / _check_tag(wanted), root / f"{wanted}.old"):
            if (folder / "meta.pt").exists() and (folder / ".metadata").exists():
                return folder
        there = sorted(p.parent.name for p in root.glob("*/meta.pt") if p.parent.suffix != ".tmp")
        raise _fail(
            root / wanted, f"no complete checkpoint there; this folder has {there or 'none'}"
        )

    chosen = ranks.together("[checkpoint] load", lambda: choose() if ranks.rank == 0 else None)
    return ranks.from_first(chosen)


def read_meta(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(meta, client state, modules' extra states) of a checkpoint folder. All but the first are
    pickles: load only checkpoints that you trust."""
    try:
        meta = torch.load(folder / "meta.pt", map_location="cpu", weights_only=True)
        client, extra = (
            torch.load(path, map_location="cpu", weights_only=False) if path.exists() else {}
            for path in (folder / "client_state.pt", folder / "extra_state.pt")
        )
    except Exception as error:
        raise _fail(folder, f"cannot be read: {error}") from error
    if meta.get("format") != FORMAT:
        raise _fail(folder, f"has format {meta.get('format')}, this version reads {FORMAT}")
    return meta, client, extra


def check_shapes(folder: Path, saved: dict[str, list[int]], mine: dict[str, list[int]]) -> None:
    """UserError unless the checkpoint holds this model's parameters."""
    for name, shape in mine.items():
        if name not in saved:
            raise _fail(folder, f"has no parameter {name}; it is of another model")
        if saved[name] != shape:
            raise _fail(folder, f"parameter {name} has shape {saved[name]} there, {shape} here")
    extra = [name for name in saved if name not in mine]
    if extra:
        raise _fail(folder, f"has a parameter {extra[0]} that this model lacks")


def check_batch(folder: Path, saved: dict[str, int], mine: dict[str, int]) -> None:
    """UserError if a step of this job does not see what a step of the saving job saw."""
    if saved["train_batch_size"] == mine["train_batch_size"]:
        return

    def show(t: dict[str, int]) -> str:
        return (
            f"train_batch_size {t['train_batch_size']} ({t['micro_batch']} x "
            f"{t['accumulation']} accumulation x {t['world']} ranks)"
        )

    raise _fail(
        folder,
        f"saved with {show(saved)}, this job has {show(mine)}; set train_batch_size to "
        f"{saved['train_batch_size']}, or load with strict_batch=False",
    )


def read_tensors(folder: Path, tensors: dict[str, Any], ranks: Ranks) -> None:
    """Fill FlatShards and tensors in place from a checkpoint folder; collective."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*no process group.*|.*single process.*")
            dcp.load(
                tensors,
                storage_reader=dcp.FileSystemReader(folder),
                planner=LoadPlanner(),
                process_group=ranks.group,
                no_dist=ranks.group is None,
            )
    except dcp.api.CheckpointException as error:
        raise _fail(folder, f"could not be loaded: {_causes(error)}") from error
    except (RuntimeError, ValueError, OSError) as error:
        raise _fail(folder, f"could not be loaded: {error}") from error


def load_rng(folder: Path, ranks: Ranks) -> None:
    """Restore this rank's generators; warn if the checkpoint has fewer ranks."""
    path = folder / f"rng_{ranks.rank}.pt"
    if not path.exists():
        warnings.warn(
            f"[checkpoint] {folder}: saved on fewer ranks, so rank {ranks.rank} keeps its own "
            "random state",
            stacklevel=2,
        )
        return
    set_rng_state(torch.load(path, map_location="cpu", weights_only=True), ranks.device)
