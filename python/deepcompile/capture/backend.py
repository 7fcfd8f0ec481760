# SPDX-License-Identifier: Apache-2.0
"""The torch.compile backend: captures each graph once and hands it to a sink.

Called by Dynamo for every graph it finds. Forward and backward are both in hand
before the first call runs. Errors leave as UserError: no failure here becomes a
silent graph break.
"""

from __future__ import annotations

import contextlib
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch._dynamo.config as dynamo_config
import torch._functorch.config as functorch_config
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import (
    BackendCompilerFailed,
    FailOnRecompileLimitHit,
    exceptions_allowed_to_be_fallback,
)
from torch._dynamo.utils import counters, detect_fake_mode, get_metrics_context
from torch._guards import TracingContext
from torch._inductor.compile_fx import partition_fn as inductor_partition
from torch._inductor.virtualized import V

from deepcompile.capture.assemble import Assembler
from deepcompile.capture.compile import RegionCompiler
from deepcompile.capture.decompositions import decomposition_table
from deepcompile.capture.direct import DirectCall, direct_call, is_plain, wrap
from deepcompile.capture.effects import mark_checkpointed
from deepcompile.capture.graph import CapturedGraph, CaptureOptions, Sink
from deepcompile.capture.joint import refuse_param_mutation, tag_must_recompute
from deepcompile.capture.lifetime import BorrowedRunner, borrowed
from deepcompile.capture.program import to_program
from deepcompile.capture.rng import unwrap_rng
from deepcompile.capture.saved import (
    add_token,
    backward_function,
    forward_function,
    inference_function,
)
from deepcompile.capture.sources import (
    clone_returned_views,
    guard_identity,
    param_inputs,
    param_sources,
)
from deepcompile.errors import UserError
from deepcompile.params import ParamTable

RECOMPILE_LIMIT = 64
"""Variants of one function that Dynamo may compile; its own default, 8, is less than the blocks
of a model whose block breaks the graph."""
MANY_VARIANTS = 8
"""From one place in the model: said then, and whenever they are twice as many."""
STAGES = ("dynamo", "aot", "partition", "cut", "compile")


def raise_from_backend(error: BaseException) -> None:
    """Raise the UserError inside an error that came out of a compiled call, or ``error``."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, UserError):
            raise inner.with_traceback(None) from (inner.__cause__ or error.__cause__)
        inner = getattr(inner, "inner_exception", None)
    raise error


@contextlib.contextmanager
def surface_errors() -> Iterator[None]:
    """Around a call of a compiled function: UserErrors of the backend come out as such, and one
    variant too many is an error (Dynamo would go on uncompiled, on this rank alone perhaps)."""
    limit = max(RECOMPILE_LIMIT, dynamo_config.recompile_limit)
    settings = dynamo_config.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True)
    try:
        with settings:
            yield
    except BackendCompilerFailed as error:
        raise_from_backend(error)
    except FailOnRecompileLimitHit as error:
        raise UserError(
            f"[capture] more than {limit} variants of one function of the model. Give the batches "
            "fewer shapes (pad them), compile with dynamic=True, or raise "
            f"torch._dynamo.config.recompile_limit. Dynamo says: {error}"
        ) from None


def make_backend(
    table: ParamTable, options: CaptureOptions, sink: Sink, *, world: int = 1
) -> CaptureBackend:
    """A backend for torch.compile over the parameters of ``table``.

    ``world``: ranks that share the parameters, for the programs' headers.
    """
    return CaptureBackend(table, options, sink, world)


class CaptureBackend:
    """Use as ``torch.compile(f, backend=backend)``, or with
    ``backend.borrowed()`` if Dynamo is not to keep it. What it compiled and the sink's runners live
    as long as it does."""

    __name__ = "deepcompile"

    def __init__(self, table: ParamTable, options: CaptureOptions, sink: Sink, world: int):
        if dynamo_config.suppress_errors:
            raise UserError(
                "[capture] torch._dynamo.config.suppress_errors: is on, so a failed capture would "
                "run eagerly without a word. Set it to False (unset TORCHDYNAMO_SUPPRESS_ERRORS)."
            )
        if not dynamo_config.inline_inbuilt_nn_modules:
            raise UserError(
                "[capture] torch._dynamo.config.inline_inbuilt_nn_modules: is off, so parameters "
                "cannot be told from constants. Set it to True."
            )
        self.table, self.options, self.sink, self.world = table, options, sink, world
        self.compiler = RegionCompiler(options)
        self.graphs: list[CapturedGraph] = []
        self._owned: list[Any] = []
        """Compiled graphs and their runners, which others hold weakly."""
        self.cloned_views: list[str] = []
        """Parameters of which a view leaves a graph: the view is a copy (see limits)."""
        self._breaks_before = Counter(counters["graph_break"])

    @property
    def graph_breaks(self) -> dict[str, int]:
        """Reason to number of graph breaks since this backend was made."""
        return dict(Counter(counters["graph_break"]) - self._breaks_before)

    def _say_how_many(self, where: str) -> None:
        count = sum(graph.user_stack == where for graph in self.graphs)
        if count < MANY_VARIANTS or count & (count - 1):
            return
        warnings.warn(
            f"[capture] {where}: captured and compiled {count} times by now, at last as "
            f"{_recompile_reason()}. Each time takes as long as the first, and more than "
            f"{RECOMPILE_LIMIT} are an error. If it goes on with the steps, keep what changes out "
            "of the forward, or pad batches to fewer shapes.",
            stacklevel=2,
        )

    def times(self) -> dict[str, float]:
        """Seconds by stage, over all graphs."""
        return {s: sum(g.times.get(s, 0.0) for g in self.graphs) for s in STAGES}

    def borrowed(self) -> Callable[..., Any]:
        """This backend, for Dynamo to hold weakly."""
        backend = borrowed(self)
        backend.__name__ = self.__name__
        return backend

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        try:
            capture = _Capture(self, gm)
            compiled = capture.run(example_inputs)
            self._owned.append(compiled)
            self._say_how_many(capture.where)
            return borrowed(compiled)
        except exceptions_allowed_to_be_fallback as error:
            cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"[capture] {_where(gm)}: an operator's result depends on data ({cause}). "
                "Rewrite it with fixed shapes, or keep that module out of the compiled forward "
                "with torch.compiler.disable."
            ) from error


def _where(gm: fx.GraphModule) -> str:
    """Where the user's code starts the graph: ``file:line in function``."""
    for node in gm.graph.nodes:
        trace = node.op != "placeholder" and node.meta.get("stack_trace")
        lines = [x.strip() for x in (trace or "").splitlines() if x.strip().startswith("File ")]
        if lines:
            return lines[-1].removeprefix("File ").replace('"', "").replace(", line ", ":")
    return "graph"


def _recompile_reason() -> str:
    """Of the frame that Dynamo captures now, in its words."""
    found = getattr(get_metrics_context(), "_metrics", {}).get("recompile_reason")
    reason, _, _ = str(found or "Dynamo says no reason").partition("User stack trace")
    return " ".join(reason.split())


def _dynamo_seconds() -> float:
    """Since Dynamo began with the current frame; 0 if it does not say."""
    start = getattr(get_metrics_context(), "_start_time_ns", 0)
    return max(0.0, time.time_ns() - start) / 1e9 if start else 0.0


class _Capture:
    """One call of the backend: from a Dynamo graph to installed sections."""

    def __init__(self, backend: CaptureBackend, gm: fx.GraphModule):
        self.backend = weakref.proxy(backend)  # AOTAutograd keeps this capture's methods
        self.gm = gm
        self.graph_id = len(backend.graphs)
        self.times = dict.fromkeys(STAGES, 0.0)
        self.times["dynamo"] = _dynamo_seconds()
        self.where = _where(gm)
        self.sources = param_sources(gm, backend.table)
        guard_identity(gm, backend.table)
        self.fake_mode: Any = None
        self.forward: fx.GraphModule | None = None
        self.metadata: Any = None
        """AOTAutograd's, of a training graph that one node of ours can stand for."""
        self.assembler: Assembler | None = None
        self.captured: CapturedGraph | None = None
        self.functions: dict[str, Callable] = {}
        """By section; there once the sink has installed the graph."""

    def run(self, example_inputs: list[Any]) -> Callable[..., Any]:
        table = self.backend.table
        with _timed(self.times, "aot"):
            for source in clone_returned_views(self.gm, self.sources):
                self.backend.cloned_views.append(table.member(self.sources[source]).name)
            self.fake_mode = detect_fake_mode(example_inputs)
            if self.fake_mode is None:
                self.fake_mode = TracingContext.get().fake_mode
            settings = functorch_config.patch(
                force_non_lazy_backward_lowering=True,
                graphsafe_rng_functionalization=False,  # states as tensors, not generators
                donated_buffer=False,
            )
            with settings, V.set_fake_mode(self.fake_mode):
                compiled = aot_autograd(
                    fw_compiler=self._keep_forward,
                    bw_compiler=self._finish_training,
                    inference_compiler=self._finish_inference,
                    partition_fn=self._partition,
                    decompositions=decomposition_table(),
                    keep_inference_input_mutations=True,
                )(self.gm, example_inputs)
        inner = ("partition", "cut", "compile")
        self.times["aot"] -= sum(self.times[s] for s in inner)
        # The sink may talk to other ranks. Not inside AOTAutograd, which dispatches in Python: the
        # GIL would be held while a collective is queued, and Gloo's threads hold the queue while
        # they wait for the GIL to give a tensor back.
        direct = self._install()
        return compiled if direct is None else wrap(direct, compiled)

    def _partition(
        self, joint: fx.GraphModule, inputs: Any, **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        with _timed(self.times, "partition"):
            params = param_inputs(joint.graph, self.sources)
            as_hint = self.backend.options.checkpoint_marks == "hint"
            mark_checkpointed(joint.graph, as_hint)
            tag_must_recompute(joint.graph, params)
            forward, backward = inductor_partition(joint, inputs, **kwargs)
            unwrap_rng(forward, backward)
            add_token(forward, backward, kwargs["num_fwd_outputs"], self.fake_mode)
            return forward, backward

    def _keep_forward(self, gm: fx.GraphModule, example_inputs: Any) -> Callable:
        self.forward = gm
        return self._section("forward")

    def _section(self, kind: str) -> Callable:
        """What AOTAutograd is given for a section before there is a runner."""

        def run(args: list) -> Any:
            return self.functions[kind](args)

        run._boxed_call = True
        return run

    def _finish_training(self, gm: fx.GraphModule, example_inputs: Any) -> Callable:
        if self.forward is None:
            raise UserError(
                f"[capture] {self.where}: the backward is itself differentiated. Double backward "
                "is not supported in the compiled model."
            )
        # Saved values are the runner's to give away; the runner refuses a second backward.
        metadata = TracingContext.get().fw_metadata
        metadata.bw_donated_idxs = []
        if is_plain(metadata, self.gm, self.forward.graph):
            self.metadata = metadata
        self.assembler = self._assembler()
        with _timed(self.times, "cut"):
            for graph in (self.forward.graph, gm.graph):
                params = param_inputs(graph, self.sources)
                refuse_param_mutation(graph, params, self.backend.table)
            self.assembler.training(self.forward, gm)
        self.forward = None
        self._compile(inference=False)
        return self._section("backward")

    def _finish_inference(self, gm: fx.GraphModule, example_inputs: Any) -> Callable:
        self.assembler = self._assembler()
        with _timed(self.times, "cut"):
            params = param_inputs(gm.graph, self.sources)
            refuse_param_mutation(gm.graph, params, self.backend.table)
            self.assembler.inference(gm)
        self._compile(inference=True)
        return self._section("inference")

    def _assembler(self) -> Assembler:
        backend = self.backend
        return Assembler(
            self.graph_id, backend.table, self.sources, backend.compiler, self.fake_mode
        )

    def _compile(self, *, inference: bool) -> None:
        backend, assembler = self.backend, self.assembler
        with _timed(self.times, "cut"):
            ir = assembler.ir
            if backend.options.deep is not None:
                ir = backend.options.deep(ir, backend.table)
            program = to_program(ir, backend.table, world=backend.world)
        with _timed(self.times, "compile"):
            cache = backend.compiler.compile(self.fake_mode)
        self.captured = CapturedGraph(
            self.graph_id,
            ir,
            program,
            backend.compiler.codes,
            inference,
            times=self.times,
            section_outputs=assembler.section_outputs,
            distinct_regions=len({r.code for r in ir.regions}),
            cache={**cache, "reused": assembler.reused},
            user_stack=self.where,
        )

    def _install(self) -> DirectCall | None:
        """Hand the graph to the sink and take its runner into use. The call of a plain graph."""
        backend, captured, assembler = self.backend, self.captured, self.assembler
        self.captured = self.assembler = None  # AOTAutograd keeps this capture
        backend.graphs.append(captured)
        owned = backend.sink.install(captured)
        backend._owned.append(owned)
        runner, calls = BorrowedRunner(owned), assembler.calls
        if captured.inference:
            self.functions["inference"] = inference_function(runner, calls["inference"])
            return None
        reached, seen = assembler.reached, {}
        self.functions["forward"] = forward_function(
            runner, calls["forward"], assembler.saved, reached, seen
        )
        self.functions["backward"] = backward_function(
            runner, calls["backward"], assembler.token, seen
        )
        if self.metadata is None:
            return None
        made = assembler.section_outputs["forward"]
        return direct_call(runner, calls, self.metadata, len(assembler.saved), made, reached)


@contextlib.contextmanager
def _timed(times: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        times[stage] += time.perf_counter() - start
