# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_launch_nodes.py run: ``two_nodes_rank.py train|wait|die FOLDER``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

STEPS = 2


def say(text: str) -> None:
    """A line in one piece: the ranks of a node share a pipe."""
    os.write(1, f"{text}\n".encode())


def train(folder: Path) -> None:
    """An all-reduce, then two steps; rank 0 compares them with plain PyTorch's."""
    import cases
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    total = torch.tensor([10.0**rank])
    dist.all_reduce(total)
    engine = cases.start("sequential", cases.config_for(world, 3), None)
    result = cases.result_of(engine, *cases.train_steps(engine, 0, STEPS))
    said = {
        "world": world,
        "node": int(os.environ["GROUP_RANK"]),
        "local": int(os.environ["LOCAL_RANK"]),
        "network": os.readlink("/proc/self/ns/net"),
        "sum": float(total),
        "losses": result["losses"],
        "folder": os.getcwd(),
        "greeting": os.environ.get("GREETING"),
    }
    if rank == 0:
        said["worst"] = cases.worst(result, cases.reference("sequential", steps=STEPS))
    (folder / f"rank{rank}.json").write_text(json.dumps(said))
    say(f"rank {rank} of {world} is done")
    dist.destroy_process_group()


def wait(folder: Path, dying: str = "") -> None:
    """Ranks that do not end; rank 1 has a process that has left its session too."""
    rank = os.environ["RANK"]
    if rank == "1":
        subprocess.Popen(["sleep", "300"], start_new_session=True)
    say(f"rank {rank} waits")
    (folder / f"rank{rank}.pid").write_text(str(os.getpid()))
    while rank != dying or len(list(folder.glob("rank*.pid"))) < 4:
        time.sleep(0.05)
    os._exit(7)


if __name__ == "__main__":
    what, where = sys.argv[1], Path(sys.argv[2])
    if what == "train":
        train(where)
    else:
        wait(where, dying="3" if what == "die" else "")
