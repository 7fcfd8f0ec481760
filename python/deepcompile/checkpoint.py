# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: one folder a tag, through torch.distributed.checkpoint (DCP).

A parameter is saved as its flattened fp32 master values and its two Adam
states; each rank writes the ranges it owns and reads the ranges it needs, so
any number of ranks can load what any other number saved. Layout:

    DIR/latest                 the newest complete tag
    DIR/TAG/*.distcp, .metadata   DCP: master.NAME, exp_avg.NAME, exp_avg_sq.NAME, buffer.NAME
    DIR/TAG/meta.pt            counters, schedule, parameter groups, shapes (rank 0)
    DIR/TAG/client_state.pt    whatever the user gave (rank 0)
    DIR/TAG/extra_state.pt     modules' own states (rank 0)
    DIR/TAG/rng_R.pt           rank R's generators
    DIR/TAG/sums.json          every file's size and checksum

Everything is written to TAG.tmp, which is renamed when complete; then `latest`
is replaced. A save that fails leaves the previous checkpoint as it was, and
removes TAG.tmp; that of one that died goes with the next save.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from . import checkpoint_files as files
from .checkpoint_files import fail as _fail
from .checkpoint_tensors import FlatShard, LoadPlanner, SavePlanner
from .checkpoint_values import check_readable, pickled_to
from .distributed import Ranks
from .errors import why_not_written

FORMAT = 2
SAVE, LOAD = "[checkpoint] save", "[checkpoint] load"
"""Stages."""
NAMES = {"groups": "optimizer.param_groups", "scheduler": "lr_scheduler.state_dict()"}
"""What the user knows parts of meta.pt by."""


def _causes(error: dcp.api.CheckpointException) -> str:
    """Each rank's own error, without the traceback."""
    return "; ".join(
        f"rank {rank}: {type(wrapped[0]).__name__}: {wrapped[0]}".removesuffix(": ")
        for rank, wrapped in error.failures.items()
    )


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


def _rng_of(path: Path, device: torch.device) -> dict[str, Any]:
    """The generators' states in a file, once generators of the same kinds have taken them."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        torch.Generator().set_state(state["torch"])
        version, internal, gauss = state["python"]
        random.Random().setstate((version, tuple(internal), gauss))
        if "cuda" in state and device.type == "cuda":
            torch.Generator(device).set_state(state["cuda"])
        if "numpy" in state:
            import numpy as np

            kind, keys, *others = state["numpy"]
            np.random.RandomState().set_state((kind, keys.numpy().astype("uint32"), *others))
    except Exception as error:  # whatever a damaged pickle raises
        raise _fail(
            path, f"cannot be read: {type(error).__name__}: {error}; load another tag"
        ) from error
    return state


def _check_tag(tag: str) -> str:
    if not isinstance(tag, str):
        raise _fail(f"tag {tag!r}", f"must be text, not {type(tag).__name__}")
    if (
        not tag or tag in (".", "..", "latest") or "/" in tag
        or tag.endswith((".tmp", ".old"))
    ):  # fmt: skip
        raise _fail(
            f"tag {tag!r}", "must be a plain folder name, other than latest, *.tmp or *.old"
        )
    return tag


def _agreed_tag(stage: str, tag: str | None, ranks: Ranks) -> str | None:
    """`tag`, once all ranks gave a good one and the same."""
    ranks.together(stage, lambda: tag is None or _check_tag(tag))
    tags = ranks.gather(tag, stage)
    for rank, other in enumerate(tags):
        if other != tags[0]:
            raise _fail(
                f"tag {tags[0]!r}", f"is rank 0's, and rank {rank} gave {other!r}; give all ranks "
                "one tag",
            )  # fmt: skip
    return tag


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
        files.sync_file(path)
    replaces = final.exists()
    if replaces:
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    try:
        temporary.rename(final)
    except OSError:
        if replaces:
            os.rename(old, final)
        raise
    (final / files.OWNER).unlink(missing_ok=True)
    pointer = root / "latest.tmp"
    try:
        pointer.write_text(tag, encoding="utf-8")
        files.sync_file(pointer)
        os.replace(pointer, root / "latest")
    finally:
        pointer.unlink(missing_ok=True)
    files.sync_file(root)
    shutil.rmtree(old, ignore_errors=True)
    files.remove_abandoned(root, (root / "latest").stat().st_mtime)


def save(
    root: str | Path,
    tag: str,
    tensors: dict[str, Any],
    meta: dict[str, Any],
    pickled: dict[str, dict[str, Any]],
    ranks: Ranks,
) -> Path:
    """Write one checkpoint; collective. `tensors`: FlatShards, and replicated tensors, of which
    rank 0's are written; `pickled`: "client" and "extra", which may be anything. Returns its
    folder."""
    root = Path(root)
    tag = _agreed_tag(SAVE, tag, ranks)
    mine = {k: t for k, t in tensors.items() if ranks.rank == 0 or isinstance(t, FlatShard)}
    try:
        _write(root, tag, mine, meta, pickled, ranks)
    except BaseException:
        if ranks.rank == 0:
            shutil.rmtree(root / f"{tag}.tmp", ignore_errors=True)
        raise
    return root / tag


def _write(
    root: Path,
    tag: str,
    tensors: dict[str, Any],
    meta: dict[str, Any],
    pickled: dict[str, dict[str, Any]],
    ranks: Ranks,
) -> None:
    temporary = root / f"{tag}.tmp"

    def prepare() -> None:
        """What can be known to be wrong is so before the tensors are written."""
        if ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            try:
                temporary.mkdir(parents=True)
                files.sign(temporary)
            except OSError as error:
                why = why_not_written(root, error)
                raise _fail(root, f"cannot be written: {why}; choose another folder") from None
            for key, value in meta.items():
                check_readable(NAMES.get(key, key), value)
            with _written(temporary):
                torch.save({"format": FORMAT, **meta}, temporary / "meta.pt")
                pickled_to("client_state", pickled["client"], temporary / "client_state.pt")
                pickled_to("get_extra_state()", pickled["extra"], temporary / "extra_state.pt")

    def finish() -> dict[str, list[int]]:
        with _written(temporary):
            torch.save(rng_state(ranks.device), temporary / f"rng_{ranks.rank}.pt")
            return files.sums_of(files.written_by(temporary, ranks.rank))

    def publish() -> None:
        if ranks.rank == 0:
            with _written(temporary):
                files.write_sums(temporary, sums)
                _publish(root, tag, ranks.world)

    ranks.together(SAVE, prepare)
    with _written(temporary), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no process group.*|.*single process.*")
        dcp.save(
            tensors,
            storage_writer=dcp.FileSystemWriter(temporary, single_file_per_rank=True),
            planner=SavePlanner(),
            process_group=ranks.group,
            no_dist=ranks.group is None,
        )
    sums = ranks.gather(ranks.together(SAVE, finish), SAVE)
    ranks.together(SAVE, publish)


@contextlib.contextmanager
def _written(folder: Path) -> Iterator[None]:
    """Around what writes to it; torch's zip writer and Gloo raise RuntimeErrors."""
    try:
        yield
    except dcp.api.CheckpointException as error:
        raise _fail(
            folder, f"could not be written: {why_not_written(folder, error, _causes(error))}; "
            "choose another folder",
        ) from error  # fmt: skip
    except (OSError, RuntimeError) as error:
        why = why_not_written(folder, error)
        raise _fail(folder, f"could not be written: {why}; choose another folder") from error


def find(root: str | Path, tag: str | None, ranks: Ranks) -> Path | None:
    """The folder to load, agreed by rank 0; None if `tag` is None and there is none yet."""
    root = Path(root)
    _agreed_tag(LOAD, tag, ranks)

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
        found = (path.parent for path in root.glob("*/meta.pt"))
        there = sorted({p.name.removesuffix(".old") for p in found if p.suffix != ".tmp"})
        raise _fail(
            root / wanted, f"no complete checkpoint there; this folder has {there or 'none'}"
        )

    chosen = ranks.together(LOAD, lambda: choose() if ranks.rank == 0 else None)
    return ranks.from_first(chosen)


def read_meta(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(meta, client state, modules' extra states) of a checkpoint folder. All but the first are
    pickles: load only checkpoints that you trust."""

    def read(name: str, only_weights: bool) -> Any:
        path = folder / name
        try:
            return torch.load(path, map_location="cpu", weights_only=only_weights)
        except Exception as error:  # whatever a damaged pickle raises
            cause = "is missing" if not path.exists() else f"cannot be read: {error}"
            raise _fail(path, f"{cause}; load another tag") from error

    meta = read("meta.pt", True)
    if meta.get("format") != FORMAT:
        raise _fail(folder, f"has format {meta.get('format')}, this version reads {FORMAT}")
    return meta, read("client_state.pt", False), read("extra_state.pt", False)


def check_shapes(
    folder: Path,
    saved: dict[str, list[int]],
    mine: dict[str, list[int]],
    kind: str = "parameter",
) -> None:
    """UserError unless the checkpoint holds this model's parameters, or what `kind` says."""
    for name, shape in mine.items():
        if name not in saved:
            raise _fail(folder, f"has no {kind} {name}; it is of another model")
        if saved[name] != shape:
            raise _fail(folder, f"{kind} {name} has shape {saved[name]} there, {shape} here")
    extra = [name for name in saved if name not in mine]
    if extra:
        raise _fail(folder, f"has a {kind} {extra[0]} that this model lacks")


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


def read_rng(folder: Path, ranks: Ranks, world: int) -> dict[str, Any] | None:
    """What `set_rng_state` takes of this rank's generators; None, with a warning, if the `world`
    ranks that saved were fewer."""
    path = folder / f"rng_{ranks.rank}.pt"
    if path.exists():
        return _rng_of(path, ranks.device)
    if ranks.rank < world:
        raise _fail(path, f"is missing, and {world} ranks saved; load another tag")
    warnings.warn(
        f"[checkpoint] {folder}: saved on fewer ranks, so rank {ranks.rank} keeps its own "
        "random state",
        stacklevel=2,
    )
    return None
