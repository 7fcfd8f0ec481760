# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's files: their sizes and checksums, and the remains of saves that died.

sums.json holds each file's size and checksum. The rank that wrote a file adds it up
from what is then in the page cache; a load has each file read once, by one rank,
before anything is overwritten.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .distributed import Ranks
from .errors import UserError

SUMS = "sums.json"
OWNER = ".owner"
"""In a folder that is being written: who writes it."""
_PIECE = 16 << 20
"""Bytes that are added up at once; part of the format."""
_THREADS = 4
_IDLE_S = 3600.0
"""A save on another host that has written nothing for so long is dead."""


def fail(what: str | Path, cause: str) -> UserError:
    return UserError(f"[checkpoint] {what}: {cause}")


def _damaged(path: Path, cause: str) -> UserError:
    return fail(path, f"{cause}: the checkpoint is damaged. Load another tag, or copy it again")


def _checksum(path: Path, size: int) -> int:
    """zlib's CRC-32 over those of the file's pieces, which are added up by several threads."""

    def piece(start: int) -> bytes:
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            left, total = min(_PIECE, size - start), 0
            while left and (data := file.read(left)):
                total = zlib.crc32(data, total)
                left -= len(data)
        return total.to_bytes(4, "little")

    with ThreadPoolExecutor(_THREADS) as pool:
        return zlib.crc32(b"".join(pool.map(piece, range(0, size, _PIECE))))


def sums_of(paths: Iterable[Path]) -> dict[str, list[int]]:
    """Name to [size, checksum] of files."""
    found = {}
    for path in paths:
        size = path.stat().st_size
        found[path.name] = [size, _checksum(path, size)]
    return found


def written_by(folder: Path, rank: int) -> list[Path]:
    """The files that `rank` wrote into a folder."""
    mine = [*folder.glob(f"__{rank}_*.distcp"), folder / f"rng_{rank}.pt"]
    if rank == 0:
        names = (".metadata", "meta.pt", "client_state.pt", "extra_state.pt")
        mine += [folder / name for name in names]
    return mine


def write_sums(folder: Path, sums: Iterable[dict[str, list[int]]]) -> None:
    merged = {name: numbers for each in sums for name, numbers in each.items()}
    (folder / SUMS).write_text(json.dumps(merged, indent=0, sort_keys=True), encoding="utf-8")


def check_files(folder: Path, ranks: Ranks) -> None:
    """UserError that names a file which is not as it was saved. Each rank reads its part of them:
    to be called on all ranks."""
    path = folder / SUMS
    try:
        sums = json.loads(path.read_text(encoding="utf-8"))
        files = sorted((name, int(size), int(total)) for name, (size, total) in sums.items())
    except FileNotFoundError:
        raise _damaged(path, "is missing") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise _damaged(path, f"cannot be read ({error})") from None
    for name, size, total in files[ranks.rank :: ranks.world]:
        _check_size(folder / name, size)
        if _checksum(folder / name, size) != total:
            raise _damaged(folder / name, "its checksum is not the one that was saved")


def _check_size(path: Path, saved: int) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise _damaged(path, "is missing") from None
    except OSError as error:
        raise fail(path, f"cannot be read: {error.strerror or error}; check its folder") from None
    if size != saved:
        raise _damaged(path, f"has {size} bytes, and {saved} were saved")


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _here() -> str:
    """This host, as far as its process numbers go."""
    space = ""
    with contextlib.suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {space}"


def sign(folder: Path) -> None:
    """Say in a folder that is being written who does."""
    text = json.dumps({"host": _here(), "pid": os.getpid()})
    (folder / OWNER).write_text(text, encoding="utf-8")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return pid != os.getpid()  # this process saves one checkpoint at a time


def _abandoned(folder: Path, now: float) -> bool:
    """Whether the save that wrote a folder is dead; never of a folder that is not signed."""
    try:
        owner = json.loads((folder / OWNER).read_text(encoding="utf-8"))
        if owner["host"] == _here():
            return not _alive(int(owner["pid"]))
        return now - max(path.stat().st_mtime for path in folder.iterdir()) > _IDLE_S
    except (OSError, ValueError, KeyError, TypeError):
        return False


def remove_abandoned(root: Path, now: float) -> None:
    """Remove what saves that died have left. `now`: by the clock of the file system."""
    for folder in root.glob("*.tmp"):
        if folder.is_dir() and _abandoned(folder, now):
            shutil.rmtree(folder, ignore_errors=True)
