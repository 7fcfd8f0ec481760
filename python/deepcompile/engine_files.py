# SPDX-License-Identifier: Apache-2.0
"""What an engine writes and reads: its state, checkpoints, exports, reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from . import engine_report, engine_state, foreign
from .errors import UserError


class EngineFiles:
    """The part of Engine that goes to files and comes from them. All of it is collective."""

    def state_dict(self, fp32: bool = False, rank0_only: bool = False) -> dict[str, torch.Tensor]:
        """Whole tensors on the CPU, by the module's names; collective.

        `fp32`: parameters as the optimizer's fp32 values, not the compute type.
        `rank0_only`: other ranks get an empty dict.
        """
        return engine_state.gathered_state(self, fp32, rank0_only)

    def save_16bit_model(
        self, save_dir: str | Path, save_filename: str = "pytorch_model.bin", **others: Any
    ) -> Path:
        """Write the whole model in its compute type to one file on rank 0; collective.
        A name that ends in .safetensors is written in that format."""
        foreign.check_call("save_16bit_model", others)
        return engine_state.export(self, Path(save_dir) / save_filename)

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        **others: Any,
    ) -> Path:
        """Save everything that a resumed run needs to go on; collective. Atomic: a save that
        dies leaves the previous one. `tag` defaults to global_stepN."""
        foreign.check_call("save_checkpoint", others)
        return engine_state.save(self, save_dir, tag, client_state)

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        *positional: Any,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        strict_batch: bool = True,
        load_module_only: bool = False,
        **others: Any,
    ) -> tuple[str | None, dict[str, Any]]:
        """(folder, client_state); collective. Without a tag the latest; (None, {}) and a
        warning if there is none. Any number of ranks can load what any other saved, if the
        train batch size is the same or `strict_batch` is False. `load_module_only`: neither
        the optimizer's states nor the schedule's."""
        foreign.check_call("load_checkpoint", others)
        if positional:
            raise UserError(
                "[engine] load_checkpoint: give what comes after the tag by its name, as "
                "DeepSpeed's third argument is load_module_strict"
            )
        optimizer = load_optimizer_states and not load_module_only
        schedule = load_lr_scheduler_states and not load_module_only
        return engine_state.load(self, load_dir, tag, optimizer, schedule, strict_batch)

    def report(self, path: str | Path, **more: Any) -> Path | None:
        """Write the HTML report of this run on rank 0: plan, simulation, the traced step,
        compilation, losses, memory; collective. `more`: keys of report.write_report to set or,
        for `notes`, to add to."""
        return engine_report.write(self, Path(path), more)

    def write_trace(self, path: str | Path) -> Path | None:
        """Write the simulated and the traced step as a Perfetto trace on rank 0; collective.
        None elsewhere, and if no compiled step was traced."""
        return engine_report.write_trace(self, Path(path))

    def write_plan(self, path: str | Path) -> Path | None:
        """Write the newest plan's text with its reasons on rank 0, and beside it, as NAME.run.json,
        what it is priced by: `deepcompile explain PATH` reads both; collective. None elsewhere, and
        before a compiled step was traced or planned."""
        return engine_report.write_plan(self, Path(path))
