# SPDX-License-Identifier: Apache-2.0
"""ZeRO-3 where nothing is compiled: module hooks gather, gradient hooks reduce.

Sharded parameters are whole while a module that owns them runs forward, and
again from the arrival of its output's gradient until their own gradient is
made. Gradients are reduced as they appear, two reductions at most in flight.

The hooks stay installed after engine.compile(): frames that Dynamo skips still
find their parameters. While Dynamo traces they do nothing.

A loss may run through models of several engines (a generator's through the
discriminator). Its backward is that of one engine, and others join in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from traceback import walk_tb
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule, skip_code

from .errors import UserError
from .params import MemberRef, ParamTable, has_no_memory

OUTSTANDING_REDUCTIONS = 2
USE_ALL = ("MultiheadAttention", "TransformerEncoderLayer")
"""Leaf modules that use all their parameters in each call, whatever the data."""

LISTS = (nn.ParameterList, nn.ParameterDict)
"""Modules that are never called: their parameters are read by the module that has them."""

ATTRIBUTE = "_deepcompile_hooks"
"""Of each hooked module: its hooks. A deep copy has None there, and is a plain module."""


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """The tensors inside nested containers, dataclasses and objects."""
    seen = set() if seen is None else seen
    if isinstance(value, torch.Tensor):
        yield value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        parts: Iterable[Any] = value.values()
    elif isinstance(value, list | tuple | set):
        parts = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, item.name, None) for item in dataclasses.fields(value)]
    elif isinstance(value, type | nn.Module) or not hasattr(value, "__dict__"):
        return
    else:
        parts = list(vars(value).values())
    for part in parts:
        yield from tensors_in(part, seen)


@contextlib.contextmanager
def views_named() -> Iterator[None]:
    """What torch says of a view of a sharded parameter, as an error that names the class to be
    named: torch looks at the size of its memory before it asks for bytes, which has our words."""
    try:
        yield
    except RuntimeError as error:
        if "out of bounds for storage of size 0" not in str(error):
            raise
        owners = [frame.f_locals.get("self") for frame, _ in walk_tb(error.__traceback__)]
        name = [type(owner).__name__ for owner in owners if isinstance(owner, nn.Module)][-1]
        raise UserError(
            f"[engine] forward: {name} reads a sharded parameter that it does not own, which has "
            f'no memory there. Name the class in zero_optimization.leaf_module.classes: ["{name}"]'
        ) from error


_running: list[EagerHooks] = []
"""Engines in the backward that runs in this process: the one that was asked for it comes first."""


def _hooks_of(module: nn.Module) -> EagerHooks | None:
    return module.__dict__.get(ATTRIBUTE)


def _present(hooks: weakref.ref[EagerHooks]) -> EagerHooks:
    present = hooks()
    if present is None:
        raise UserError(
            "[engine] backward: its engine is gone. Keep the engine until the backward of its last "
            "forward."
        )
    return present


def take_part(hooks: weakref.ref[EagerHooks]) -> None:
    """A compiled graph's backward begins: UserError unless an engine's runs, which this joins."""
    present = _present(hooks)
    present._take_part("a compiled forward")
    present._finish_reductions()  # the graph may reduce the same parameters


class EagerHooks:
    """Hooks on one model. `runtime` is the engine's; the engine brackets each backward with
    begin_backward() and end_backward()."""

    def __init__(
        self, model: nn.Module, table: ParamTable, runtime: Any, leaf_classes: tuple[str, ...]
    ):
        self._table = table
        self._runtime = runtime
        self._holds: Counter[str] = Counter()  # running modules that need a param whole
        self._gathered: set[str] = set()  # by these hooks, in the running backward
        self._gradient_hooks: dict[MemberRef, int] = {}  # their numbers in torch
        self._members: dict[str, list[torch.Tensor]] = {}
        for ref in table.refs():
            self._members.setdefault(table.spec(ref).name, []).append(table.tensor(ref))
        self._versions: dict[str, list[int]] = {}  # of what modules were gathered for
        self._compiled_by_user: str | None = None
        self.joined = False
        """Whether another engine's backward made gradients here since the last step."""
        self.loss_scale = 1.0
        """Of the running backward."""
        self.joined_scale = 1.0
        """That of the other engine's."""
        self.broken = False
        """Whether such a one failed half-way, and the gradients were not dropped since."""
        self._in_backward = False
        self._reducing: deque[str] = deque()
        self._packs: dict[int, dict[str, torch.Tensor]] = {}
        self._frozen = [r for r in table.refs() if not table.spec(r).trainable]
        self._leaf_params: dict[int, None] = {}  # trainable, of leaf modules, in the model's order
        self._leaf_gradients: dict[int, dict[str, torch.Tensor]] = {}
        self._leaf_ran = False
        self.order = 0
        """Checksum of the params gathered and reduced by hooks, in order; alike on all ranks."""
        self.reduced = 0  # reductions started by hooks since the engine began
        self.made = 0  # gradients that hooks took
        self.every_pack = True
        """Whether a backward reduces all packs: nothing is compiled, whose plans do."""
        trained = (i for i, spec in enumerate(table.params) if spec.packed and spec.trainable)
        self._all_packs = tuple(trained)
        self._install(model, leaf_classes)

    def __deepcopy__(self, _memo: Any) -> None:
        """A copy of the model has nothing to gather."""

    def check_uncompiled(self) -> None:
        """UserError where hooks do not work: in code that the user had compiled nothing gathers,
        and who comes after ours finds no gradient."""
        if self._compiled_by_user is not None:
            raise UserError(
                f"[engine] forward: {self._compiled_by_user} is compiled, where the parameters "
                "that stage 3 shards are not gathered. Give initialize() the model as it is and "
                "call engine.compile(), or choose another stage"
            )
        for ref, ours in self._gradient_hooks.items():
            hooks = self._table.tensor(ref)._post_accumulate_grad_hooks
            if next(reversed(hooks), ours) != ours:
                raise UserError(
                    f"[engine] {self._table.member(ref).name}: has a hook for its accumulated "
                    "gradient that was registered after initialize(), and would find none: "
                    "register it before"
                )

    def _install(self, model: nn.Module, leaf_classes: tuple[str, ...]) -> None:
        for module in model.modules():
            by_user = isinstance(module, OptimizedModule) or module._compiled_call_impl is not None
            if by_user and self._sharded(module, recurse=True):
                self._compiled_by_user = f"{type(module).__name__}"
            whole = any(cls.__name__ in leaf_classes for cls in type(module).__mro__)
            names = self._sharded(module, recurse=whole)
            varies = whole and not any(cls.__name__ in USE_ALL for cls in type(module).__mro__)
            if varies:
                self._note_leaf(module)
            if (names or varies) and not isinstance(module, LISTS):
                self._hook_module(module, names, varies)
        for ref in self._table.refs():
            if self._table.spec(ref).trainable:
                self._hook_gradient(ref)
        model.__dict__[ATTRIBUTE] = self
        model.register_state_dict_pre_hook(self._before_state_dict)
        model.register_load_state_dict_pre_hook(self._before_load_state_dict)

    @staticmethod
    def _before_state_dict(module: nn.Module, _prefix: str, keep_vars: bool) -> None:
        hooks = _hooks_of(module)
        if hooks and not keep_vars:  # otherwise the parameters themselves are asked for
            hooks._check_whole("state_dict", "call engine.state_dict()")

    @staticmethod
    def _before_load_state_dict(module: nn.Module, *_args: Any) -> None:
        hooks = _hooks_of(module)
        if hooks:
            hooks._check_load()

    def _check_load(self) -> None:
        remedy = (
            "load the values before initialize(), inside GatheredParameters with a modifier_rank, "
            "or call engine.load_checkpoint()"
        )
        self._check_whole("load_state_dict", remedy)
        for ref in self._table.refs():
            spec = self._table.spec(ref)
            if spec.trainable and not self._holds[spec.name]:
                raise UserError(
                    f"[engine] load_state_dict of the module: the next update would write the "
                    f"optimizer's own value of {self._table.member(ref).name} over it; {remedy}"
                )

    def _check_whole(self, what: str, remedy: str) -> None:
        for ref in self._table.refs():
            if has_no_memory(self._table.tensor(ref)):
                raise UserError(
                    f"[engine] {what} of the module: {self._table.member(ref).name} is sharded and "
                    f"not gathered, so it has no memory here; {remedy}"
                )

    def _note_leaf(self, module: nn.Module) -> None:
        for parameter in module.parameters():
            ref = self._table.lookup(parameter)
            spec = self._table.spec(ref)
            if spec.trainable and not spec.packed:
                self._leaf_params[ref.param] = None

    def _sharded(self, module: nn.Module, recurse: bool) -> list[str]:
        """Names of the sharded params that hold this module's parameters, each once."""
        found: dict[str, None] = {}
        parameters = list(module.parameters(recurse=recurse))
        if not recurse:
            lists = [child for child in module.children() if isinstance(child, LISTS)]
            parameters += [p for each in lists for p in each.parameters()]
        for parameter in parameters:
            spec = self._table.spec(self._table.lookup(parameter))
            if spec.placement == "sharded":
                found[spec.name] = None
        return list(found)

    def _hook_module(self, module: nn.Module, names: list[str], varies: bool) -> None:
        """`varies`: which of its parameters it uses depends on the data."""
        # Without children and with everything frozen, all that reads the weights in the
        # backward leads to the gradient of the one input.
        frozen_leaf = not any(module.children()) and not any(
            p.requires_grad for p in module.parameters()
        )

        def before(module: nn.Module, _args: tuple) -> None:
            if not torch.compiler.is_compiling() and (hooks := _hooks_of(module)):
                hooks._before_forward(names)
                hooks._leaf_ran |= varies and torch.is_grad_enabled()

        def after(module: nn.Module, args: tuple, output: Any) -> None:
            if not torch.compiler.is_compiling() and (hooks := _hooks_of(module)):
                hooks._after_forward(names, args if frozen_leaf else (), output)

        # Dynamo traces through the hooks of a module that it captures, and there they do nothing.
        # It must not compile them by themselves when it skipped the module: there they work.
        skip_code(before.__code__)
        skip_code(after.__code__)
        module.__dict__[ATTRIBUTE] = self
        theirs = list(module._forward_pre_hooks)
        module.register_forward_pre_hook(before)
        # Before the user's, which may read the parameters (weight_norm's, for one). With
        # prepend=True, Dynamo takes one hook for another.
        for key in theirs:
            module._forward_pre_hooks[key] = module._forward_pre_hooks.pop(key)
        module.register_forward_hook(after, always_call=True)

    def _hook_gradient(self, ref: MemberRef) -> None:
        # The runtime holds the parameter, which holds its hooks: a circle through C++, which
        # Python's collector cannot see.
        hooks = weakref.ref(self)

        def made(parameter: torch.Tensor) -> None:
            _present(hooks)._gradient_made(ref, parameter)

        tensor = self._table.tensor(ref)
        self._gradient_hooks[ref] = tensor.register_post_accumulate_grad_hook(made).id

    @torch.compiler.disable
    def _before_forward(self, names: list[str]) -> None:
        first = [name for name in names if self._holds[name] <= 0]
        self._holds.update(names)
        self._make_whole(names)
        self._versions.update((name, self._versions_of(name)) for name in first)

    def _versions_of(self, name: str) -> list[int]:
        return [tensor._version for tensor in self._members[name]]

    @torch.compiler.disable
    def _after_forward(self, names: list[str], inputs: tuple, output: Any) -> None:
        self._holds.subtract(names)
        for name in names:
            if self._holds[name] <= 0 and self._versions.get(name) != self._versions_of(name):
                raise UserError(
                    f"[engine] {name}: was written to in the forward, which would be lost: at "
                    "stage 3 its memory goes with it. Write to it between steps, inside "
                    "GatheredParameters with a modifier_rank"
                )
        if torch.is_grad_enabled():
            self._hook_output(names, inputs, output)
        if not self._in_backward:  # else this is a recomputation: its backward follows
            self._release(names)

    def _hook_output(self, names: list[str], inputs: tuple, output: Any) -> None:
        hooks = weakref.ref(self)  # an output that is kept does not keep the engine

        def gather(_gradient: torch.Tensor) -> None:
            present = _present(hooks)
            present._join()
            present._make_whole(names)

        def release(_gradient: torch.Tensor) -> None:
            _present(hooks)._release(names)

        # What is written in place to a view bypasses the hooks of the view, not those of its base:
        # a Linear's output of three dimensions is a view of what the matmul made.
        outputs = list(tensors_in(output))
        bases = [t._base for t in outputs if t._is_view() and t._base.grad_fn is not None]
        for tensor in [*outputs, *bases]:
            if tensor.requires_grad:
                tensor.register_hook(gather)
        needing = [t for t in tensors_in(inputs) if t.requires_grad]
        if len(needing) == 1:
            needing[0].register_hook(release)

    def _make_whole(self, names: list[str]) -> None:
        missing = [name for name in names if not self._runtime.is_whole(name)]
        if missing:
            self._log("gather", missing)
            self._runtime.gather(missing)
            self._runtime.wait(missing)
        if self._in_backward:
            self._gathered.update(names)

    def _release(self, names: list[str]) -> None:
        idle = [name for name in names if self._holds[name] <= 0]
        if idle:
            self._runtime.release(idle)
            self._gathered.difference_update(idle)

    def hold(self, names: list[str]) -> None:
        """Make params whole, and keep them so through module calls until let_go()."""
        self._make_whole(names)
        self._holds.update(names)

    def let_go(self, names: list[str]) -> None:
        """End one hold()."""
        self._holds.subtract(names)
        self._release(names)

    def begin_backward(self, loss_scale: float) -> None:
        self.loss_scale = loss_scale
        for ref in self._frozen:
            if self._table.tensor(ref).requires_grad:
                raise UserError(
                    f"[engine] {self._table.member(ref).name}: requires a gradient since "
                    "initialize(), where it was frozen; unfreeze parameters before initialize()"
                )
        self._in_backward = True
        _running[:] = [self]

    def _finish_reductions(self, failed: bool = False) -> None:
        while self._reducing:
            name = self._reducing.popleft()
            # A compiled part that failed has dropped all reductions, these among them.
            with contextlib.suppress(UserError) if failed else contextlib.nullcontext():
                self._runtime.accumulate(name)

    def _take_part(self, what: str) -> None:
        self._join()
        if not self._in_backward:
            raise UserError(
                f"[engine] gradient of {what}: made outside engine.backward(loss). Call that "
                "instead of loss.backward(). A forward that calls torch.autograd.grad trains "
                "without engine.compile() only."
            )

    def _join(self) -> None:
        """Take part in the backward of another engine, if one runs."""
        if not self._in_backward and _running:
            self._in_backward = self.joined = True
            self.joined_scale = _running[0].loss_scale
            _running.append(self)

    def end_backward(self, failed: bool = False) -> None:
        """Of all that took part: reduce what is left, wait for all reductions, release what is
        still whole."""
        ended, _running[:] = list(_running), []
        for hooks in ended:
            hooks._end_backward(failed)

    def _end_backward(self, failed: bool) -> None:
        self._in_backward = False
        if failed and self.joined:
            self.joined, self.broken = False, True
        if failed:
            self._packs.clear()
            self._leaf_gradients.clear()
            self._leaf_ran = False
        self._reduce_leaves()
        # Here and in one order, as each rank may have used other members. All of them, as one may
        # have used none.
        every = self._all_packs if self.every_pack and not failed else sorted(self._packs)
        for index in every:
            self._reduce(self._table.params[index].name, self._packs.pop(index, {}))
        self._finish_reductions(failed)
        self._release(sorted(self._gathered))

    def _gradient_made(self, ref: MemberRef, parameter: torch.Tensor) -> None:
        if parameter.grad is None:
            return  # a compiled graph's, which its plan reduces
        gradient, parameter.grad = parameter.grad, None
        self.made += 1
        spec, name = self._table.spec(ref), self._table.member(ref).name
        self._take_part(name)
        if not spec.packed:
            if ref.param in self._leaf_params:
                made = self._leaf_gradients.setdefault(ref.param, {})
                made[name] = made[name] + gradient if name in made else gradient
            else:
                self._reduce(spec.name, {name: gradient})
            if spec.placement == "sharded":
                self._release([spec.name])
            return
        pending = self._packs.setdefault(ref.param, {})
        pending[name] = pending[name] + gradient if name in pending else gradient

    def _reduce_leaves(self) -> None:
        """Reduce what leaf modules made. Each rank may have used other parts of them, experts
        for one, so all of them are reduced, in one order."""
        if not self._leaf_ran:
            return
        self._leaf_ran = False
        for index in self._leaf_params:
            self._reduce(self._table.params[index].name, self._leaf_gradients.pop(index, {}))

    def _log(self, what: str, names: list[str]) -> None:
        self.order = zlib.crc32(" ".join([what, *names]).encode(), self.order)

    def _reduce(self, name: str, gradients: dict[str, torch.Tensor]) -> None:
        if name in self._reducing:  # its buffer is taken: finish that one first
            self._reducing.remove(name)
            self._runtime.accumulate(name)
        while len(self._reducing) >= OUTSTANDING_REDUCTIONS:
            self._runtime.accumulate(self._reducing.popleft())
        self._log("reduce", [name])
        self._runtime.reduce(name, gradients)
        self._reducing.append(name)
        self.reduced += 1
