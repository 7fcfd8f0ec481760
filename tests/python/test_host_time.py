# SPDX-License-Identifier: Apache-2.0
"""benchmarks/micro/host_time.py runs, and counts what the plan holds."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "micro" / "host_time.py"


def test_host_time_of_a_small_model(tmp_path):
    out = tmp_path / "host.json"
    options = "--layers 2 --steps 2 --warmup 2 --plan stage --backend eager --regions null"
    command = [sys.executable, str(SCRIPT), *options.split(), "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    ops = row["instructions"]
    # Two layers of seven matrices, embedding, head, and a pack of the norms.
    assert ops["reduce"]["count"] == ops["update"]["count"] == 2 * 7 + 2 + 1
    assert row["us_by_place"]["executor"]["median"] > 0
    assert row["ms"]["all"]["min"] > 0
    assert "executor" in done.stdout and "us each" in done.stdout
