# SPDX-License-Identifier: Apache-2.0
"""A trace of the warm-up's last steps on rank 0, under the seed benchmark's folder name."""

from __future__ import annotations

import functools
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ..distributed import Ranks
from .conditions import Condition, model_file_word
from .options import Options

STEPS = 3


@functools.cache
def experiment(condition: Condition) -> str:
    """The seed's exp_name, of when it was first asked for."""
    model = model_file_word(condition.model)
    deepspeed = condition.framework.startswith(("zero", "ds_"))
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d%H%M%S")
    return (
        f"{model}_np{condition.world}ds{int(deepspeed)}B{condition.backend}"
        f"z{condition.zero_stage}L{condition.num_layers}bs{condition.batch_size}"
        f"seq{condition.seq_length}acc{condition.accumulation}"
        f"ac{int(condition.activation_checkpointing)}"
        f"pass_{'_'.join(condition.passes) or 'none'}_os{int(condition.offload_adam)}T{stamp}"
    )


class Tracer:
    """Nothing, unless the options ask for a trace."""

    def __init__(self, condition: Condition, options: Options, ranks: Ranks):
        self._wanted = options.profile and ranks.rank == 0
        self._last = options.warmup_step - 1
        self._first = max(0, options.warmup_step - STEPS)
        self._folder = Path(options.profile_dir) / experiment(condition)
        self._profiler: Any = None

    def __enter__(self) -> Tracer:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._profiler is not None:  # a step failed
            self._profiler.stop()

    def before(self, step: int) -> None:
        if self._wanted and step == self._first:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=kinds)
            self._profiler.start()

    def after(self, step: int) -> None:
        if self._profiler is None or step != self._last:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self._folder / "trace.json"))
        print(f"[bench] wrote {self._folder / 'trace.json'}", flush=True)
