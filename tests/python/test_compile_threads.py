# SPDX-License-Identifier: Apache-2.0
"""Compiling in several threads: in a process of its own, which torch may end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TRAIN = """
import os, threading
from test_engine import start, step

def train():
    engine = start()
    engine.compile(backend="eager")
    return step(engine)

def thread():
    losses.append(train())
    done.set()
    threading.Event().wait()

losses, done = [], threading.Event()
threading.Thread(target=thread, daemon=True).start()
done.wait(120)
losses.append(train())
print(losses[0] == losses[1], flush=True)
os._exit(0)
"""


def test_a_thread_that_compiled_and_lives_is_no_obstacle_to_another():
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", TRAIN],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        timeout=200,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr[-2000:]
