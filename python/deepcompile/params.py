# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a model are gathered, reduced and updated together.

A *param* is one large ``nn.Parameter``, or a *pack* of many small ones of the
same dtype and trainability in one flat buffer. The grouping depends on the
model and on ``persistence_threshold`` alone, never on the stage or the world
size, so that a plan of stage 0 and one of stage 3 sum in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from deepcompile import _core
from deepcompile.errors import UserError

PERSISTENCE_THRESHOLD = 100_000
"""Elements; a parameter with fewer is packed and stays whole (DeepSpeed's default)."""
MEMBER_ALIGNMENT = 16
"""Elements; members of a pack start on multiples of this: 32 bytes in bf16."""

DTYPES = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f64": torch.float64,
}
"""By the step program's word."""
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PLACEMENTS = {
    0: ("replicated", "replicated"),
    1: ("whole", "whole"),
    2: ("whole", "whole"),
    3: ("sharded", "whole"),
}
"""Stage to the placement of (large parameters, packs)."""


def dtype_name(dtype: torch.dtype) -> str:
    """The step program's word for an element type, e.g. ``bf16``."""
    return _DTYPE_NAMES[dtype]


def ir_name(name: str) -> str:
    """``name`` as the step program can write it: ``[A-Za-z_][A-Za-z0-9_.:/-]*``."""
    return _core.ir_name(name)


@dataclass(frozen=True)
class MemberRef:
    """Member ``member`` of param ``param`` of a table."""

    param: int
    member: int = 0


@dataclass(frozen=True)
class MemberSpec:
    name: str
    """The module's own name of it; of tied parameters, the first."""
    shape: tuple[int, ...]
    numel: int
    offset: int
    """Elements from the start of the param's flat buffer."""


@dataclass(frozen=True)
class ParamSpec:
    name: str
    """Valid in a step program, unique in its table."""
    dtype: torch.dtype
    numel: int
    """Elements of the flat buffer, alignment gaps included, before padding to the world size."""
    placement: str
    """``sharded``, ``whole`` or ``replicated``."""
    trainable: bool
    members: tuple[MemberSpec, ...]
    packed: bool = False


@dataclass
class ParamTable:
    """The params of one model. Holds its parameters, so that their identity lasts."""

    params: list[ParamSpec]
    stage: int
    persistence_threshold: int
    _tensors: list[list[nn.Parameter]]
    _refs: dict[int, MemberRef] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for i, members in enumerate(self._tensors):
            for j, tensor in enumerate(members):
                self._refs[id(tensor)] = MemberRef(i, j)

    def lookup(self, tensor: object) -> MemberRef | None:
        """The member that ``tensor`` is, by identity."""
        return self._refs.get(id(tensor))

    def tensor(self, ref: MemberRef) -> nn.Parameter:
        return self._tensors[ref.param][ref.member]

    def replace(self, ref: MemberRef, tensor: nn.Parameter) -> None:
        """Let ``tensor`` be the member from now on."""
        del self._refs[id(self.tensor(ref))]
        self._tensors[ref.param][ref.member] = tensor
        self._refs[id(tensor)] = ref

    def spec(self, ref: MemberRef) -> ParamSpec:
        return self.params[ref.param]

    def member(self, ref: MemberRef) -> MemberSpec:
        return self.params[ref.param].members[ref.member]

    def operand(self, ref: MemberRef) -> str:
        """The member as an operand of the step program: ``embed`` or ``pack.f32[3]``."""
        name = self.params[ref.param].name
        return f"{name}[{ref.member}]" if ref.member else name

    def is_seam(self, ref: MemberRef) -> bool:
        """Whether its first use may start a region: large parameters only."""
        return not self.params[ref.param].packed

    def refs(self) -> Iterator[MemberRef]:
        for i, spec in enumerate(self.params):
            for j in range(len(spec.members)):
                yield MemberRef(i, j)

    def find(self, member_name: str) -> MemberRef | None:
        """The member of that name in the module; ``None`` if there is none."""
        return next((r for r in self.refs() if self.member(r).name == member_name), None)

    @classmethod
    def build(
        cls,
        model: nn.Module,
        *,
        stage: int = 3,
        persistence_threshold: int = PERSISTENCE_THRESHOLD,
        anywhere: bool = False,
    ) -> ParamTable:
        """Group ``model``'s parameters. Raises UserError for those that cannot be sharded.
        ``anywhere``: they may be on several devices, as they are on their way to one."""
        if stage not in _PLACEMENTS:
            raise UserError(
                f"[params] stage {stage}: does not exist. Set zero_optimization.stage to 0, 1, 2 "
                "or 3."
            )
        named = list(model.named_parameters())  # one name per tensor: tied ones once
        _check(model, named, anywhere)
        large, small = [], {}
        for name, tensor in named:
            if tensor.numel() < persistence_threshold:
                small.setdefault((tensor.dtype, tensor.requires_grad), []).append((name, tensor))
            else:
                large.append((name, tensor))
        names = _UniqueNames(ir_name(name) for name, _ in large)
        sharded, packed = _PLACEMENTS[stage]
        specs = [_large_param(names, name, t, sharded) for name, t in large]
        tensors = [[t] for _, t in large]
        for (dtype, trainable), members in small.items():
            specs.append(_pack(names, dtype, trainable, members, packed))
            tensors.append([t for _, t in members])
        return cls(specs, stage, persistence_threshold, tensors)


class _UniqueNames:
    """Hands out names that no other param of the table has."""

    def __init__(self, wanted: Iterator[str]):
        self._wanted = set(wanted)
        self._taken: set[str] = set()

    def take(self, name: str) -> str:
        unique, n = name, 1
        while unique in self._taken:
            n += 1
            unique = f"{name}.{n}"
        self._taken.add(unique)
        return unique

    def take_new(self, name: str) -> str:
        """``name``, or a variant, that no wanted name has either."""
        while name in self._wanted:
            name += "_"
        return self.take(name)


def _large_param(names: _UniqueNames, name: str, tensor: nn.Parameter, placement: str) -> ParamSpec:
    member = MemberSpec(name, tuple(tensor.shape), tensor.numel(), 0)
    return ParamSpec(
        names.take(ir_name(name)),
        tensor.dtype,
        tensor.numel(),
        placement,
        tensor.requires_grad,
        (member,),
    )


def _pack(
    names: _UniqueNames,
    dtype: torch.dtype,
    trainable: bool,
    members: list[tuple[str, nn.Parameter]],
    placement: str,
) -> ParamSpec:
    specs, end = [], 0
    for name, tensor in members:
        offset = -(-end // MEMBER_ALIGNMENT) * MEMBER_ALIGNMENT
        specs.append(MemberSpec(name, tuple(tensor.shape), tensor.numel(), offset))
        end = offset + tensor.numel()
    suffix = "" if trainable else ".frozen"
    name = names.take_new(f"pack.{dtype_name(dtype)}{suffix}")
    return ParamSpec(name, dtype, end, placement, trainable, tuple(specs), packed=True)


def _check(model: nn.Module, named: list[tuple[str, nn.Parameter]], anywhere: bool) -> None:
    if not any(t.requires_grad for _, t in named):
        raise UserError(
            f"[params] {type(model).__name__}: no parameter requires a gradient, so there is "
            "nothing to train. Set requires_grad on the parameters to be trained."
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise UserError(
                f"[params] {name or type(module).__name__}: makes sparse gradients, which cannot "
                "be reduced. Build the embedding with sparse=False."
            )
    storages: dict[tuple[torch.device, int], str] = {}
    first_name, first = named[0]
    for name, tensor in named:
        cause, remedy = _unsupported(tensor)
        if cause is None and tensor.device != first.device and not anywhere:
            cause = f"is on {tensor.device}, while {first_name} is on {first.device}"
            remedy = "Move the whole model to one device before initialize"
        if cause is None:
            address = tensor.untyped_storage().data_ptr()
            other = storages.setdefault((tensor.device, address), name) if address else name
            if other != name:
                cause = f"shares memory with {other} without being the same nn.Parameter"
                remedy = "Tie them by assigning one nn.Parameter to both, or clone one"
        if cause is not None:
            raise UserError(f"[params] {name}: {cause}. {remedy}.")


def has_no_memory(tensor: torch.Tensor) -> bool:
    """Whether an engine shards ``tensor``, and has not gathered it."""
    return tensor.numel() > 0 and not tensor.untyped_storage().size()


def _unsupported(tensor: nn.Parameter) -> tuple[str | None, str]:
    """(why ``tensor`` cannot be sharded or None, what to do about it)."""
    if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
        return "has no shape yet (lazy module)", "Run one batch through the model first"
    if tensor.layout is not torch.strided:
        return f"has layout {tensor.layout}", "Use dense parameters (sparse=False)"
    if tensor.is_quantized:
        return "is a quantised tensor", "Train the dequantised model"
    if torch.utils._python_dispatch.is_traceable_wrapper_subclass(tensor):
        kind = type(tensor).__name__ if type(tensor) is not nn.Parameter else type(tensor.data)
        return (
            f"is a tensor subclass ({kind})",
            "Pass a model of plain tensors: sharding is deepcompile's part (no DTensor, FSDP "
            "or tensor parallel wrapper)",
        )
    if tensor.dtype not in _DTYPE_NAMES:
        known = ", ".join(str(d).removeprefix("torch.") for d in _DTYPE_NAMES)
        return f"has dtype {tensor.dtype}", f"Use one of {known}"
    if tensor.numel() == 0:
        return "has no elements", "Remove it from the model"
    if not tensor.is_contiguous():
        return (
            f"is not contiguous (strides {tuple(tensor.stride())})",
            "Assign param.data = param.data.contiguous() before initialize",
        )
    return None, ""
