# SPDX-License-Identifier: Apache-2.0
"""The engine's state in and out: checkpoints, whole state dicts, compile times, a traced step."""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import checkpoint
from .checkpoint import LOAD, SAVE
from .checkpoint_tensors import FlatShard
from .checkpoint_values import check_readable, plain, restored, without_program
from .errors import UserError, writing
from .params import MemberRef
from .profile import Profile, region_costs

if TYPE_CHECKING:
    from .engine import Engine

STATES = ("master", "exp_avg", "exp_avg_sq")


def _shapes(engine: Engine) -> dict[str, list[int]]:
    table = engine.table
    return {table.member(ref).name: list(table.member(ref).shape) for ref in table.refs()}


def _shards(engine: Engine, kinds: tuple[str, ...]) -> dict[str, FlatShard]:
    """KIND.NAME to this rank's ranges, for every parameter; empty where it owns none.

    A frozen parameter has values ("master", in its own type) and no states.
    """
    table, shards = engine.table, {}
    for ref in table.refs():
        spec, member = table.spec(ref), table.member(ref)
        trained = torch.float64 if spec.dtype == torch.float64 else torch.float32
        for kind in kinds:
            if kind == "master" or spec.trainable:
                dtype = trained if spec.trainable else spec.dtype
                shards[f"{kind}.{member.name}"] = FlatShard(member.numel, dtype)
    for piece in engine.runtime.pieces():
        for kind in kinds:
            shard = shards.get(f"{kind}.{piece['member']}")
            if shard is not None:
                shard.add(piece["start"], piece["weight"] if piece[kind] is None else piece[kind])
    return shards


def _member_steps(engine: Engine) -> dict[str, int]:
    """Updates each parameter has had; parameters without gradients have fewer."""
    mine = {piece["member"]: piece["step"] for piece in engine.runtime.pieces()}
    steps: dict[str, int] = {}
    for theirs in engine.ranks.gather(mine):
        steps |= theirs
    return steps


def _buffers(engine: Engine) -> dict[str, torch.Tensor]:
    """Persistent buffers by the module's names."""
    own = {id(parameter) for parameter in engine.module.parameters()}
    extra = _with_extra_state(engine.module)
    return {
        name: tensor
        for name, tensor in engine.module.state_dict(keep_vars=True).items()
        if id(tensor) not in own and isinstance(tensor, torch.Tensor) and name not in extra
    }


def _with_extra_state(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Modules that have more to keep than tensors, by the name that state_dict() gives it."""
    none = torch.nn.Module.get_extra_state
    return {
        f"{name}._extra_state".removeprefix("."): each
        for name, each in module.named_modules()
        if type(each).get_extra_state is not none
    }


def _batch(engine: Engine) -> dict[str, int]:
    return {
        "train_batch_size": engine.train_batch_size(),
        "micro_batch": engine.train_micro_batch_size_per_gpu(),
        "accumulation": engine.gradient_accumulation_steps(),
        "world": engine.ranks.world,
    }


def save(
    engine: Engine, directory: str | Path, tag: str | None, client: dict[str, Any] | None
) -> Path:
    """Engine.save_checkpoint."""
    engine.ranks.meet("save_checkpoint")
    engine.ranks.together(SAVE, lambda: _check_save(engine, client))
    engine.planner.settle()
    steps = _member_steps(engine)
    meta, extra = engine.ranks.together(SAVE, lambda: _state(engine, steps))
    tensors: dict[str, Any] = dict(_shards(engine, STATES))
    tensors |= {f"buffer.{name}": tensor for name, tensor in _buffers(engine).items()}
    tag = f"global_step{engine.global_steps}" if tag is None else tag
    pickled = {"client": dict(client or {}), "extra": extra}
    return checkpoint.save(directory, tag, tensors, meta, pickled, engine.ranks)


def _check_save(engine: Engine, client: Any) -> None:
    if engine.micro_steps % engine.gradient_accumulation_steps():
        raise UserError(
            "[checkpoint] save: in the middle of an accumulation, whose gradients are not saved; "
            "save after the step() that updates the parameters"
        )
    if engine._backward_done or engine._backward_failed:
        raise UserError(
            "[checkpoint] save: between backward() and step(), whose gradients are not saved; save "
            "after the step()"
        )
    if not isinstance(client, (dict, type(None))):
        raise UserError(
            f"[checkpoint] client_state: must be a dict, not {type(client).__name__}; give "
            '{"name": value}'
        )


def _state(engine: Engine, steps: dict[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what a checkpoint keeps beside tensors, modules' own states)."""
    scheduler = engine.lr_scheduler
    meta = {
        "batch": _batch(engine),
        "shapes": _shapes(engine),
        "global_steps": engine.global_steps,
        "micro_steps": engine.micro_steps,
        "skipped_steps": engine.skipped_steps,
        "loss_scale": engine._loss_scale.state() if engine._loss_scale.on else None,
        "optimizer_steps": engine.runtime.optimizer_steps(),
        "member_steps": steps,
        "groups": engine.optimizer.hyper_state(),
        "scheduler": None if scheduler is None else _of_schedule(scheduler),
        "buffers": {name: list(tensor.shape) for name, tensor in _buffers(engine).items()},
        "epoch": getattr(_sampler(engine), "epoch", None),
    }
    extra = {k: m.get_extra_state() for k, m in _with_extra_state(engine.module).items()}
    return meta, extra


def _of_schedule(scheduler: Any) -> Any:
    """Its state; UserError, by check_schedule, where that cannot be kept."""
    return plain(without_program(scheduler.state_dict()))


def check_schedule(scheduler: Any) -> None:
    """UserError if a checkpoint could not keep this scheduler's state, if there is one."""
    if scheduler is None:
        return
    if not all(hasattr(scheduler, name) for name in ("state_dict", "load_state_dict")):
        raise UserError(
            f"[initialize] lr_scheduler: {type(scheduler).__name__} has no state_dict() and "
            "load_state_dict(), which checkpoints need; add them"
        )
    check_readable(checkpoint.NAMES["scheduler"], _of_schedule(scheduler))


def _sampler(engine: Engine) -> Any:
    """What numbers the passes over training_data, if there is any."""
    return getattr(engine.training_dataloader, "sampler", None)


def load(
    engine: Engine,
    directory: str | Path,
    tag: str | None,
    load_optimizer: bool,
    load_scheduler: bool,
    strict_batch: bool,
) -> tuple[str | None, dict[str, Any]]:
    """Engine.load_checkpoint."""
    engine.ranks.meet("load_checkpoint")
    folder = checkpoint.find(directory, tag, engine.ranks)
    if folder is None:
        warnings.warn(f"[checkpoint] {directory}: has no checkpoint yet", stacklevel=3)
        return None, {}
    meta, client, extra, generators = engine.ranks.together(LOAD, lambda: _check(
        engine, folder, strict_batch, load_optimizer))  # fmt: skip
    engine.planner.settle()
    kinds = STATES if load_optimizer else ("master",)
    tensors: dict[str, Any] = dict(_shards(engine, kinds))
    tensors |= {f"buffer.{name}": tensor for name, tensor in _buffers(engine).items()}
    checkpoint.read_tensors(folder, tensors, engine.ranks)
    engine.runtime.masters_changed()
    engine.ranks.together(LOAD, lambda: _restore(
        engine, meta, extra, load_optimizer, load_scheduler))  # fmt: skip
    if load_optimizer:
        engine.runtime.abandon_step()  # of a backward that failed: what it had updated is replaced
    engine.zero_grad()
    engine._backward_done = False
    if generators is not None:
        checkpoint.set_rng_state(generators, engine.ranks.device)
    engine.planner.at_step(engine.global_steps)
    return str(folder), client


def _restore(
    engine: Engine,
    meta: dict[str, Any],
    extra: dict[str, Any],
    load_optimizer: bool,
    load_scheduler: bool,
) -> None:
    """Everything beside tensors and generators."""
    for name, module in _with_extra_state(engine.module).items():
        if name in extra:
            module.set_extra_state(extra[name])
    if load_optimizer:
        engine.runtime.set_step(meta["optimizer_steps"])
        for member, step in meta["member_steps"].items():
            engine.runtime.set_member_step(member, step)
        engine.optimizer.load_hyper_state(restored(meta["groups"]))
    if load_scheduler and engine.lr_scheduler is not None and meta["scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(restored(meta["scheduler"]))
        last = getattr(engine.lr_scheduler, "get_last_lr", None)
        if last is not None and not load_optimizer:
            rates = last()  # they come with the schedule: it sets them at its next step
            for group, rate in zip(engine.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
    engine.global_steps, engine.micro_steps = meta["global_steps"], _micro_steps(engine, meta)
    engine.skipped_steps = meta["skipped_steps"]
    if load_optimizer and meta.get("loss_scale"):
        engine._loss_scale.load(meta["loss_scale"])
    sampler = _sampler(engine)
    if meta.get("epoch") is not None and hasattr(sampler, "set_epoch"):
        sampler.set_epoch(meta["epoch"])


def _check(
    engine: Engine, folder: Path, strict_batch: bool, load_optimizer: bool
) -> tuple[dict, dict, dict, dict | None]:
    """What can be known to be wrong before anything is overwritten."""
    checkpoint.files.check_files(folder, engine.ranks)
    meta, client, extra = checkpoint.read_meta(folder)
    checkpoint.check_shapes(folder, meta["shapes"], _shapes(engine))
    mine = {name: list(tensor.shape) for name, tensor in _buffers(engine).items()}
    checkpoint.check_shapes(folder, meta["buffers"], mine, "buffer")
    own = dict.fromkeys(_with_extra_state(engine.module), [])
    checkpoint.check_shapes(folder, dict.fromkeys(extra, []), own, "module's state")
    if strict_batch:
        checkpoint.check_batch(folder, meta["batch"], _batch(engine))
    if load_optimizer:
        engine.optimizer.check_groups(meta["groups"])
    generators = checkpoint.read_rng(folder, engine.ranks, meta["batch"]["world"])
    return meta, client, extra, generators


def _micro_steps(engine: Engine, meta: dict[str, Any]) -> int:
    """Micro-batches this rank would have run for the steps taken."""
    if meta["batch"]["accumulation"] == engine.gradient_accumulation_steps():
        return meta["micro_steps"]
    return meta["global_steps"] * engine.gradient_accumulation_steps()


def _whole_fp32(engine: Engine, keep: bool) -> dict[str, torch.Tensor]:
    """Parameters as the optimizer holds them, whole, on the CPU if `keep`. One at a time on the
    device: each rank adds its range to zeros, so the sum over ranks is exact."""
    shards, whole = _shards(engine, ("master",)), {}
    table, ranks = engine.table, engine.ranks
    for ref in table.refs():
        spec, member = table.spec(ref), table.member(ref)
        shard = shards[f"master.{member.name}"]
        full = torch.zeros(member.numel, dtype=torch.float64 if shard.dtype == torch.float64
                           else torch.float32, device=ranks.device)  # fmt: skip
        for start, data in shard.chunks.items():
            full[start : start + data.numel()] = data
        if ranks.world > 1 and spec.placement != "replicated":
            torch.distributed.all_reduce(full, group=ranks.group)
        if keep:
            whole[member.name] = full.view(member.shape).cpu()
    return whole


def _whole_compute(engine: Engine, keep: bool) -> dict[str, torch.Tensor]:
    """Parameters in the compute type, whole, on the CPU if `keep`; one param gathered at a
    time."""
    table, hooks, whole = engine.table, engine.hooks, {}
    for index, spec in enumerate(table.params):
        hooks.hold([spec.name])
        for j, member in enumerate(spec.members if keep else ()):
            whole[member.name] = table.tensor(MemberRef(index, j)).detach().cpu().clone()
        hooks.let_go([spec.name])
    return whole


def gathered_state(
    engine: Engine, fp32: bool, rank0_only: bool, call: str = "state_dict"
) -> dict[str, torch.Tensor]:
    """Engine.state_dict, asked for by `call`."""
    engine.ranks.meet(call)
    engine.planner.settle()
    keep = engine.ranks.rank == 0 or not rank0_only  # else every rank would fill the host
    whole = _whole_fp32(engine, keep) if fp32 else _whole_compute(engine, keep)
    if not keep:
        return {}
    names = {id(engine.table.tensor(r)): engine.table.member(r).name for r in engine.table.refs()}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        member = names.get(id(tensor))
        if member is not None:
            state[name] = whole[member]  # tied names share one tensor
        elif isinstance(tensor, torch.Tensor):
            state[name] = tensor.detach().cpu().clone()
        else:
            state[name] = tensor
    return state


def export(engine: Engine, path: Path) -> Path:
    """Engine.save_16bit_model."""
    state = gathered_state(engine, fp32=False, rank0_only=True, call="save_16bit_model")

    def write() -> None:
        if engine.ranks.rank:
            return
        partial = path.with_name(path.name + ".tmp")
        try:
            with writing("checkpoint", path, also=(RuntimeError,)):  # torch's zip writer's
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.suffix == ".safetensors":
                    _write_safetensors(state, partial)
                else:
                    torch.save(state, partial)
                os.replace(partial, path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()

    engine.ranks.together("[checkpoint] save_16bit_model", write)
    return path


def _write_safetensors(state: dict[str, Any], path: Path) -> None:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise UserError(
            f"[checkpoint] {path}: safetensors is not installed; pip install safetensors, or use "
            "a name that ends in .bin"
        ) from None
    once: dict[int, str] = {}
    for name, tensor in state.items():
        once.setdefault(id(tensor), name)
    try:
        save_file({n: state[n].contiguous() for n in once.values()}, path, {"format": "pt"})
    except SafetensorError as error:  # of any kind, a full disk's too
        raise RuntimeError(str(error)) from error


def compile_times(graphs: list[Any]) -> list[tuple[str, int, int, float]]:
    """(direction, graph index, graph id, seconds). Stages that serve both directions of a graph
    are counted with its forward."""
    rows = []
    for index, installed in enumerate(graphs):
        captured = installed.captured
        shared = sum(captured.times.values()) + sum(installed.seconds.values())
        for section in installed.program.sections:
            backward = section.kind == "backward"
            rows.append(("bwd" if backward else "fwd", index, captured.graph_id,
                         0.0 if backward else shared))  # fmt: skip
    return rows


def compile_report(graphs: list[Any]) -> dict[str, Any]:
    """Stages' seconds and counts over all captured graphs."""
    stages: dict[str, float] = {}
    cache: dict[str, int] = {}
    for installed in graphs:
        for stage, seconds in [*installed.captured.times.items(), *installed.seconds.items()]:
            stages[stage] = stages.get(stage, 0.0) + seconds
        for what, count in installed.captured.cache.items():
            cache[what] = cache.get(what, 0) + count
    keys = {region.key for i in graphs for region in i.captured.ir.regions}
    return {
        "stages": stages,
        "graphs": len(graphs),
        "regions": sum(len(i.captured.ir.regions) for i in graphs),
        "distinct_regions": len(keys),
        "cache": cache,
    }


def plan_report(engine: Engine) -> dict[str, Any]:
    """What was planned, when, and for how many bytes."""
    planner, relief = engine.planner, engine.relief
    agreed = planner.agreed
    return {
        "plans": len(planner.history),
        "plan_seconds": sum(line.seconds for line in planner.history),
        "recompilations": planner.recompilations,
        "plan_passes": [] if agreed is None else agreed.entry,
        "budget": planner.budget,
        "memory_relieved": relief.times,
        "budgets_lowered": relief.lowered,
        "plan_failures": list(planner.failures),
    }


def collect_trace(engine: Engine, seconds: float) -> Profile:
    """Records of the step that just ended, and what else is known of it."""
    planner, records = engine.planner, [tuple(r) for r in engine.runtime.records()]
    ran = {record[0] for record in records}
    order = [*planner.watch.forwards, *range(len(planner.graphs))]
    graphs = [planner.graphs[number] for number in dict.fromkeys(order)]
    plans = [(g.plan_id, g.program) for g in graphs if g.plan_id in ran]
    plans.append((planner.update_plan_id, planner.update_program))
    return Profile(
        engine.global_steps,
        records,
        plans,
        list(planner.watch.forwards),
        region_costs(records, plans),
        engine.runtime.peak_bytes() or None,
        seconds,
        planner.agreed,
    )
