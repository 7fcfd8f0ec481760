# SPDX-License-Identifier: Apache-2.0
"""The engine that initialize() returns: forward, backward, step, and what is around them.

It owns one runtime (shards, transfers, optimizer), one planner and one set of
eager hooks, so several engines live side by side. Python decides nothing in a
step: it scales the loss, counts micro-batches, and asks the runtime.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import logging
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from . import engine_state, foreign
from .capture import CaptureBackend, EqualLayers, make_entry, output_of, surface_errors
from .config import Config
from .distributed import Ranks
from .eager import EagerHooks, take_part, views_named
from .engine_files import EngineFiles
from .engine_numbers import EngineNumbers
from .errors import UserError
from .fast_forms import FastForms
from .loss_scale import LossScale
from .optimizer import ShardedOptimizer
from .params import ParamTable
from .planning import Planner
from .profile import Profile
from .relief import Relief
from .variants import Variants, check_arguments, make_capture

log = logging.getLogger("deepcompile")

KEPT_LOSSES = 10_000
"""Steps whose loss is kept for the report."""
TRACED_STEP = 2
"""Which step after compile() is traced for the report, counted from 0: the first has settled
allocations and code. So is the second step of each plan that all ranks agreed on."""
GRAPH_STEPS = 3
"""Steps of a plan before one is launched from CUDA graphs: two alike, and the recorded one."""

# An engine is part of cycles of references and holds its process group. One that was dropped goes
# before the interpreter does: a thread of Gloo's that then gives a tensor back aborts the process.
atexit.register(gc.collect)


class Engine(EngineFiles, EngineNumbers):
    """Trains one model. Made by deepcompile.initialize()."""

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        ranks: Ranks,
        table: ParamTable,
        runtime: Any,
        source: torch.optim.Optimizer,
        forms: FastForms,
    ):
        """`source`: a fresh torch Adam or AdamW whose numbers the runtime's optimizer uses.
        `forms`: what the model is switched to while it runs compiled."""
        self.module = model
        self.config = config
        self.ranks = ranks
        self.table = table
        self.runtime = runtime
        self.planner = Planner(table, config, ranks, runtime)
        self.relief = Relief(self.planner, runtime, ranks)
        self.equal_layers = EqualLayers(model, config.compile.equal_layers)
        self.hooks = EagerHooks(model, table, runtime, config.zero_optimization.leaf_module.classes)
        self.planner.watch.on_backward = functools.partial(take_part, weakref.ref(self.hooks))
        self._loss_scale = LossScale(config.fp16)
        self.optimizer = ShardedOptimizer(
            source,
            {id(table.tensor(ref)): table.member(ref).name for ref in table.refs()},
            runtime.set_hyper,
            lambda: runtime.step(self.planner.update_plan_id, **self._loss_scale.undone()),
            runtime.zero_grad,
        )
        self.optimizer.check_covers(table)
        self.lr_scheduler: Any = None
        self.training_dataloader: Any = None
        self.global_steps = 0
        self.micro_steps = 0
        self.skipped_steps = 0
        self.losses: deque[tuple[int, torch.Tensor]] = deque(maxlen=KEPT_LOSSES)
        """(step, loss on this rank) of the last micro-batch of each step, for the report."""
        self.trace: Profile | None = None
        """The newest traced step."""
        self._tracing_since: float | None = None
        # Where steps will be launched from graphs, a plan is made from one that was.
        self._settling = GRAPH_STEPS if runtime.replays()["on"] else 1
        self._trace_at = max(TRACED_STEP, self._settling)
        self._eager_reductions = 0
        self.fast_forms = forms
        self._entry = make_entry(
            model, config.compile.differentiable_outputs, config.compile.loss_only
        )
        self._compiled: Callable[..., Any] | None = None
        self._variants: Variants | None = None
        self._backend: CaptureBackend | None = None
        self._compiled_steps = 0
        self._grad_norm: Any = None
        self._loss: torch.Tensor | None = None
        self._backward_done = False
        self._backward_failed = False
        self._applied = False
        self._warned = False
        self._clocks = {"forward": 0.0, "backward": 0.0, "step": 0.0}

    # ---- compilation

    def compile(
        self,
        backend: str = "inductor",
        compile_kwargs: dict[str, Any] | None = None,
        schedule: Sequence[tuple[int, Sequence[Any]]] | None = None,
        compiled_autograd_enabled: bool = False,
        **others: Any,
    ) -> None:
        """Compile the model's forward and backward at its next call. A second call is a no-op.

        `backend`: inductor, or eager to run the regions' operators as they are.
        `compile_kwargs`: torch.compile's `dynamic`, `fullgraph` and `options`. `schedule`:
        [(step, [passes])], where a pass is a name, an object of deepcompile.passes or a function;
        an entry holds from its step on. Default: the configuration's.
        """
        foreign.check_call("compile", others)
        if self._compiled is not None:
            return
        if compiled_autograd_enabled:
            warnings.warn(
                "[engine] compile: compiled_autograd_enabled has no effect: the backward is "
                "captured with the forward",
                stacklevel=2,
            )
        kwargs = dict(compile_kwargs or {})
        check_arguments(backend, kwargs)
        self.planner.set_schedule(schedule, self.global_steps)
        if not self.config.compile.deepcompile:
            warnings.warn(
                "[engine] compile: compile.deepcompile is false, so training stays eager",
                stacklevel=2,
            )
            return
        self._backend = make_capture(
            self.config.compile, self.table, self.planner, self.equal_layers.deep,
            self.ranks.world, backend, kwargs,
        )  # fmt: skip
        self._variants = Variants(
            self.module, self.table, self.config.compile, self._backend.borrowed(), kwargs
        )
        self._compiled, self.hooks.every_pack = self._variants.first, False
        self._compiled_steps = 0
        if self.planner.load_cached(backend):
            self._trace_at = self._settling

    def register_compile_pass(
        self, name: str, fn: Callable[..., Any], contract: Any = None
    ) -> None:
        """Make `fn(program, context)` usable under `name` in this engine's schedule."""
        self.planner.register(name, fn, contract)

    @property
    def is_compiled(self) -> bool:
        return self._compiled is not None

    def is_deepcompile_enabled(self) -> bool:
        return self.config.compile.deepcompile

    def is_deepcompile_active(self) -> bool:
        return self._compiled is not None

    def get_compile_time(self) -> list[tuple[str, int, int, float]]:
        """(direction, graph index, graph id, seconds) of each captured direction."""
        return engine_state.compile_times(self.planner.graphs)

    def compile_report(self) -> dict[str, Any]:
        """Seconds by stage, regions and distinct regions, disk cache hits, over all graphs; the
        reasons for graph breaks with how often each was met; what gathers and reductions go
        over, and why; of each embedding, whether only rows in use are exchanged, and why; the fast
        forms in use; whether few layers are traced for all, and why; whose kernels update ("adamw")
        and measure gradients ("norm"): deepcompile_cuda, torch or cpu, and the library's path or
        why there is none; what of a step is launched from CUDA graphs."""
        breaks = {} if self._backend is None else self._backend.graph_breaks
        return {
            **engine_state.compile_report(self.planner.graphs),
            **engine_state.plan_report(self),
            "graph_breaks": breaks,
            "gathers": self.runtime.gathers,
            "reductions": self.runtime.reductions,
            "embedding_rows": self.planner.rows.report(),
            "kernels": self.runtime.kernels(),
            "cuda_graphs": self.runtime.replays(),
            "fast_forms": self.fast_forms.report(),
            "equal_layers": self.equal_layers.report(),
        }

    # ---- a step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs for this rank's micro-batch."""
        if self._compiled is not None:
            self._follow_parameters()
            if self.module.training and torch.is_grad_enabled():
                self._begin_micro_batch()
            else:
                self.planner.settle()
        else:
            self.hooks.check_uncompiled()
        with self._clock("forward"):
            if self._compiled is None:
                with views_named():
                    return output_of(self._entry(*args, **kwargs))
            with surface_errors(), self.fast_forms.applied(args, kwargs):
                if self._compiled is not self._variants.first:  # layers may differ by now
                    return output_of(self._compiled(*args, **kwargs))
                return output_of(self.equal_layers.call(self._compiled, args, kwargs))

    def _follow_parameters(self) -> None:
        """Take the forward that was captured with the parameters that require gradients now. One
        that no plan knows is planned from the beginning, by all ranks."""
        self._compiled, new = self._variants.now()
        begins = self.micro_steps % self.gradient_accumulation_steps() == 0
        if begins:
            self._variants.check_hooks()
        if not new or self.planner.agreed is None:
            return
        frozen = self._variants.frozen()
        if not begins or any(other != frozen for other in self.ranks.gather(frozen)):
            raise UserError(
                "[engine] forward: parameters were frozen or unfrozen on some ranks alone, or "
                f"amid a step ({len(frozen)} are frozen here, of those that were trained at "
                "first); do it on all ranks, between steps"
            )
        self._compiled_steps = 0
        self.planner.begin_anew(self.global_steps, "parameters were frozen or unfrozen")

    def _begin_micro_batch(self) -> None:
        """Trace the step that this micro-batch begins, if someone wants that."""
        if self.micro_steps % self.gradient_accumulation_steps() or self._tracing_since is not None:
            return
        steps = self._compiled_steps
        settled = steps >= self._settling
        if steps == self._trace_at or (settled and self.planner.wants_profile(self.global_steps)):
            if self.device.type != "cpu":
                self.runtime.reset_peak_bytes()
            self.runtime.trace(True)
            self._tracing_since = time.perf_counter()

    def backward(
        self, loss: torch.Tensor, retain_graph: bool = False, **others: Any
    ) -> torch.Tensor:
        """Gradients of loss / accumulation steps, reduced over ranks into shards."""
        foreign.check_call("backward", others)
        if retain_graph:
            raise UserError(
                "[engine] backward: retain_graph=True is not supported, as a forward's activations "
                "go with its backward; add the losses and call backward once"
            )
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise UserError(
                "[engine] backward: needs the loss as a tensor of one element that requires a "
                "gradient; was it computed under no_grad, or left out of "
                "compile.differentiable_outputs?"
            )
        self._check_gradients()
        if self._compiled is not None:
            self._variants.check_unchanged()
            self.optimizer.push()  # what a plan updates in this backward uses it
            self.runtime.set_last_micro_batch(self.is_gradient_accumulation_boundary())
            self._warn_of_evaluation_mode()
        self._loss = loss.detach()
        made = self.hooks.made
        self.hooks.begin_backward(self.loss_scale())
        failed = self._backward_failed = True
        try:
            with self._clock("backward"):
                self._loss_scale.of(loss, self.gradient_accumulation_steps()).backward()
                failed = False
        finally:
            self.hooks.end_backward(failed)
        self._backward_failed = False
        if not self.planner.watch.forwards and self.hooks.made == made:
            raise UserError(
                "[engine] backward: the loss reaches no parameter of this engine; compute it from "
                "what the engine's forward returned"
            )
        self._backward_done = True
        return loss

    def _warn_of_evaluation_mode(self) -> None:
        if not self.module.training and not self._warned:
            self._warned = True
            warnings.warn(
                "[engine] backward: the model is in evaluation mode, as Hugging Face's "
                "from_pretrained leaves it; such steps are neither profiled nor planned. Call "
                "engine.train() before them.",
                stacklevel=3,
            )

    def _check_gradients(self) -> None:
        if self._backward_failed or self.hooks.broken:
            raise UserError(
                "[engine] the last backward failed half-way, so the gradients hold a part of it: "
                "call engine.zero_grad() to drop them, and begin the step's micro-batches again"
            )

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the next step() updates the parameters."""
        return (self.micro_steps + 1) % self.gradient_accumulation_steps() == 0

    def step(self, **others: Any) -> None:
        """End a micro-batch; at accumulation boundaries update parameters and learning rate."""
        foreign.check_call("step", others)
        self._check_gradients()
        if not self._backward_done and not self.hooks.joined:
            raise UserError(
                "[engine] step: no backward(loss) since the last step(); call "
                "engine.backward(loss), not loss.backward()"
            )
        if self.hooks.joined and self.hooks.joined_scale != self.loss_scale():
            raise UserError(
                "[engine] step: gradients came by another engine's backward, whose loss scale is "
                f"{self.hooks.joined_scale:g} and not {self.loss_scale():g}; train both in bf16, "
                "or with one fixed fp16.loss_scale"
            )
        self._backward_done = self.hooks.joined = False
        boundary = self.is_gradient_accumulation_boundary()
        self.micro_steps += 1
        self._applied = False
        if not boundary:
            return
        if self._compiled is None and not self.ranks.agree(self.hooks.order):
            self._backward_failed = True
            raise UserError(
                "[engine] step: the ranks gathered or reduced different parameters since the last "
                "step, so its gradients are wrong: the model takes different paths on different "
                "ranks. Name the module around those paths in zero_optimization.leaf_module.classes"
            )
        if self._compiled is not None and self._compiled_steps == 0:
            self._backward_failed = True  # its gradients are wrong if transfers differed
            self.planner.check_ranks()
            self._backward_failed = False
        with self._clock("step"):
            result = self.optimizer.step_of_engine()
        self._grad_norm = result["grad_norm"]
        self._applied = not result["skipped"]
        self.skipped_steps += result["skipped"]
        if self._applied and self.lr_scheduler is not None:
            self.lr_scheduler.step()
        self._end_step()
        self._loss_scale.follow(result["skipped"], self.global_steps, self.ranks.rank)

    def _end_step(self) -> None:
        self.global_steps += 1
        self.losses.append((self.global_steps, self._loss))
        if self._compiled is None:
            self.planner.at_step(self.global_steps)
        else:
            self._end_compiled_step()
        every = self.config.steps_per_print
        if every and self.global_steps % every == 0:
            self._print()

    def _end_compiled_step(self) -> None:
        profile = None
        if self._tracing_since is not None:
            profile = engine_state.collect_trace(self, time.perf_counter() - self._tracing_since)
            self.trace, self._tracing_since = profile, None
            self.runtime.trace(False)
        self._compiled_steps += 1
        if self.hooks.reduced != self._eager_reductions:
            # Parts that are not compiled read their parameters without a gather of the plan's.
            self._eager_reductions = self.hooks.reduced
            self.planner.settle()
        plans = len(self.planner.history)
        self.planner.end_step(self.global_steps, profile)
        self.relief.end_step(self.global_steps)
        if len(self.planner.history) != plans:
            self._trace_at = self._compiled_steps + self._settling

    def _print(self) -> None:
        if self.ranks.rank == 0:
            rates = ", ".join(f"{lr:.3e}" for lr in self.get_lr())
            line = f"step {self.global_steps}: loss {float(self._loss):.4f}, lr {rates}"
            if self._loss_scale.on:
                line += f", loss scale {self.loss_scale():g}"
            if self.config.wall_clock_breakdown:
                line += "".join(f", {k} {v:.3f} s" for k, v in self._clocks.items())
            print(line, flush=True)
        self._clocks = dict.fromkeys(self._clocks, 0.0)

    @contextlib.contextmanager
    def _clock(self, what: str) -> Iterator[None]:
        if not self.config.wall_clock_breakdown:
            yield
            return
        self._synchronise()
        start = time.perf_counter()
        yield
        self._synchronise()
        self._clocks[what] += time.perf_counter() - start

    def _synchronise(self) -> None:
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)

    # ---- the model

    def train(self, mode: bool = True) -> Engine:
        """Switch the model's mode. To evaluation: collective, as parameters are brought up to
        date if the plan leaves updates to the next step."""
        if not mode:
            self.planner.settle()
        self.module.train(mode)
        return self

    def eval(self) -> Engine:
        return self.train(False)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients accumulated so far. After a backward that failed, the step's micro-batches
        begin again."""
        self.optimizer.zero_grad(set_to_none)
        self.hooks.joined = self.hooks.broken = False
        if self._backward_failed:
            self.micro_steps -= self.micro_steps % self.gradient_accumulation_steps()
            self._backward_failed = self._backward_done = False

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self.module.parameters(recurse)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return self.module.named_parameters(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "module":  # not set yet: __init__ failed
            raise AttributeError(name)
        return foreign.of_engine(self.module, name)
