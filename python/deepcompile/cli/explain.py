# SPDX-License-Identifier: Apache-2.0
"""``deepcompile explain``: what was chosen for each parameter and region, why, and what the next
best would have cost. Equal layers share a line."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from .. import _core
from ..report.other_choices import NOT_PLANNED, is_planned, other_text, others_of


@dataclass
class Choice:
    """What a plan does with one parameter or region."""

    kind: str
    name: str
    form: str
    """Type and size, in words."""
    reasons: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    """What the next best would have cost."""

    def key(self) -> tuple:
        """Equal for the same choice in equal layers: numbers that depend on the place are left
        out."""
        texts = [re.sub(r"\d[\d.,]*", "#", text) for text in (*self.reasons, *self.others)]
        texts = [re.sub(r"# runs\b", "# run", text) for text in texts]  # 1 run or 2 runs ahead
        return self.kind, re.sub(r"\d+", "#", self.name), self.form, tuple(texts)


def explain(
    program: _core.StepProgram,
    machine: _core.Machine,
    sim: _core.SimResult,
    budget: int,
    costs: _core.CostTable | None,
    everything: bool = False,
    early_updates: bool = False,
) -> str:
    """The text; with ``everything``, each object by itself and when its transfers run."""
    others = others_of(program, machine, budget, costs, early_updates)
    head, *params = _core.explain(program, sim).split("\n\n")[: 1 + len(program.params)]
    choices = choices_of(program, others, sim.peak_bytes <= budget)
    lines = [] if is_planned(program) else [NOT_PLANNED]
    lines += [head.rstrip(), *whole_lines(program, others)]
    if everything:
        for param, choice in zip(params, choices, strict=False):
            lines += ["", param.rstrip(), *(f"  else: {text}" for text in choice.others)]
        lines.append("")
        for choice in choices[len(program.params) :]:
            lines += group_lines([choice])
    else:
        groups: dict[tuple, list[Choice]] = defaultdict(list)
        for choice in choices:
            groups[choice.key()].append(choice)
        lines.append("")
        for group in groups.values():
            lines += group_lines(group)
        lines += ["", "--all lists each parameter and region, and when its transfers run."]
    return "\n".join(lines) + "\n"


def whole_lines(program: _core.StepProgram, others: list[_core.Alternative]) -> list[str]:
    """What concerns no single object."""
    whole = [f"why: {r.text} [{r.pass_name}]" for r in program.reasons if r.object == ""]
    whole += [f"else: {other_text(other)}" for other in others if not other.objects]
    return ["", "the step as a whole", *(f"  {line}" for line in whole)] if whole else []


def choices_of(
    program: _core.StepProgram, others: list[_core.Alternative], fits: bool
) -> list[Choice]:
    """In the order of the program's tables: parameters, then regions. `fits`: the budget holds
    the step."""
    reasons, instead = defaultdict(list), defaultdict(list)
    for reason in program.reasons:
        reasons[reason.object].append(f"{reason.text} [{reason.pass_name}]")
    for other in others:
        for name in other.objects:
            instead[name].append(other_text(other))
    size = _core.pretty_bytes
    choices = []
    for param in program.params:
        form = f"{param.dtype}, {size(param.full_bytes)}, {param.placement}"
        if not param.trainable:
            form += ", frozen"
        if len(param.members) > 1:
            form += f", packs {len(param.members)} parameters"
        name = param.name
        choices.append(Choice("param", name, form, reasons[name], instead[name]))
    runs: dict[str, int] = defaultdict(int)
    for section in program.sections:
        for instr in section.instrs:
            if instr.op == "run":
                runs[instr.operand] += 1
    sizes = {v.name: v.bytes for v in program.values}
    for region in program.regions:
        form = f"code {region.code}, makes {size(sum(sizes[v] for v in region.outputs))}"
        if region.time is not None:
            form += f", {_core.pretty_nanos(region.time)}"
        form += ", recomputed" if runs[region.name] > 1 else ""
        name = region.name
        why = reasons[name] or [unchanged(bool(instead[name]), fits)]
        choices.append(Choice("region", name, form, why, instead[name]))
    return choices


def unchanged(choice: bool, fits: bool) -> str:
    """Why a region is as it was captured, where no pass said it."""
    if not choice:
        return "as captured: a plan has no other choice for it"
    return "as captured: " + ("the step fits its budget" if fits else "no pass changed it")


def group_lines(group: list[Choice]) -> list[str]:
    first, name = group[0], group[0].name
    if len(group) > 1:
        name = f"{first.name} .. {group[-1].name} ({len(group)} alike)"
    lines = [f"{first.kind} {name}: {first.form}"]
    lines += [f"  why: {text}" for text in dict.fromkeys(first.reasons)]
    for text, count in Counter(first.others).items():
        lines.append(f"  else: {text}" + (f" ({count} alike)" if count > 1 else ""))
    return lines
