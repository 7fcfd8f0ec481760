# SPDX-License-Identifier: Apache-2.0
"""run.sh: one condition on all ranks, its output shown and kept in a log."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError, exit_code
from . import beforehand, peers, process
from .arguments import log_name, parse_run
from .lines import job_text


def main(argv: Sequence[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return exit_code(lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    place = process.place_from()
    condition, options = parse_run(argv, place.world, place.nodes)
    reason = peers.why_not(condition)
    if reason is not None:
        raise UserError(f"[bench] {condition.label}: {reason}.")
    peers.check_warmup(condition, options)
    log = Path(os.environ.get("LOG_BASE") or "logs") / log_name(condition)
    beforehand.models([condition.model])
    beforehand.folders(options, log.parent)
    beforehand.host_memory([condition], place)
    print(f"Logging to {log}", flush=True)
    outcome = process.run(
        place,
        ["--job", job_text([condition], options)],
        log,
        on_line=lambda line: print(line, flush=True),
    )
    if not outcome.errors and outcome.launch_error:
        raise UserError(f"{outcome.launch_error} (log: {log})")
    if outcome.error is not None:
        raise UserError(f"[bench] {condition.label}: {outcome.error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
