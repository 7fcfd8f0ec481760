# SPDX-License-Identifier: Apache-2.0
"""Random valid plans of a whole step.

A plan starts as what the stage's pass and a random choice of other passes make of a
compute-only step, under a random memory budget. Then single random edits follow, each of which
the verifier accepted: transfers earlier or later, releases left out, regions run again,
activations and optimizer states moved to the host and back, updates deferred. The order in which
regions first run, which decides the random numbers they draw, is never touched.

Same program and seed: same plan, on every rank and machine.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepcompile import _core
from deepcompile.errors import UserError

Instr = _core.Instr
Edit = Callable[["Draft", random.Random], bool]

OPTIONAL = (
    "rematerialize",
    "offload_activation",
    "offload_adam_states",
    "selective_gather",
    "place_optimizer",
    "prefetch",
    "order_link",
    "coalesce",
)
"""Passes that may follow the stage's, in the order in which they compose."""
SYNC = "offload_adam_states_sync"
"""The other form of offload_adam_states."""
MOVES_STATES = ("offload_states", "evict_states", "reload_states", "await_states")
MOVES_VALUES = ("offload", "evict", "reload", "await")


@dataclass(frozen=True)
class RegionFacts:
    """What an edit asks of a region."""

    values: frozenset[str]
    params: tuple[str, ...]
    outputs: tuple[str, ...]
    once: bool


class Draft:
    """The instructions of a step, for edits; `program` is the last valid state."""

    def __init__(self, program: Any):
        self.program = program
        self.code: list[list[Any]] = [list(section.instrs) for section in program.sections]
        self.kinds = [section.kind for section in program.sections]
        self.graphs = [section.graph for section in program.sections]
        self.placement = {p.name: p.placement for p in program.params}
        self.trainable = [p.name for p in program.params if p.trainable]
        self.regions = {r.name: self._facts(r) for r in program.regions}

    def _facts(self, region: Any) -> RegionFacts:
        names = [name.split("[")[0] for name in region.inputs]
        params = tuple(dict.fromkeys(n for n in names if n in self.placement))
        values = frozenset(n for n in names if n not in self.placement)
        return RegionFacts(values, params, tuple(region.outputs), region.once)

    def sections(self, *kinds: str) -> list[int]:
        return [i for i, kind in enumerate(self.kinds) if kind in kinds]

    def places(self, *ops: str, kinds: tuple[str, ...] = ()) -> list[tuple[int, int]]:
        """(section, position) of every instruction of these kinds."""
        return [
            (s, i)
            for s, code in enumerate(self.code)
            for i, instr in enumerate(code)
            if instr.op in ops and (not kinds or self.kinds[s] in kinds)
        ]

    def at(self, place: tuple[int, int]) -> Any:
        return self.code[place[0]][place[1]]

    def reads(self, instr: Any) -> frozenset[str]:
        """Values that an instruction needs."""
        if instr.op == "run":
            return self.regions[instr.region].values
        return frozenset(instr.values)

    def makes(self, instr: Any) -> tuple[str, ...]:
        return self.regions[instr.region].outputs if instr.op == "run" else ()

    def uses(self, section: int, param: str) -> list[int]:
        """Positions of the runs that read a parameter."""
        return [
            i
            for i, instr in enumerate(self.code[section])
            if instr.op == "run" and param in self.regions[instr.region].params
        ]

    def touching(self, section: int, param: str, *ops: str) -> list[int]:
        """Positions of instructions of these kinds on a parameter."""
        return [
            i
            for i, instr in enumerate(self.code[section])
            if instr.op in ops and instr.param == param
        ]

    def insert(self, section: int, at: int, *instrs: Any) -> None:
        self.code[section][at:at] = instrs

    def move(self, section: int, source: int, target: int) -> None:
        """Take an instruction out and put it back at `target`, counted without it."""
        code = self.code[section]
        code.insert(target, code.pop(source))

    def built(self) -> Any:
        """A verified program of the current instructions. Raises UserError."""
        program = self.program.copy()
        for section, code in zip(program.sections, self.code, strict=True):
            section.set_instrs(code)
        program.verify_plan()
        return program


def pick(rng: random.Random, items: Any) -> Any:
    items = list(items)
    return rng.choice(items) if items else None


def between(rng: random.Random, low: int, high: int) -> int:
    """Uniform in [low, high]; `low` if there is no room."""
    return rng.randint(low, max(low, high))


# ---- transfers of parameters


def earlier_gather(draft: Draft, rng: random.Random) -> bool:
    place = pick(rng, draft.places("gather"))
    if place is None or place[1] == 0:
        return False
    section, at = place
    ends = draft.touching(section, draft.at(place).param, "release", "update", "defer")
    floor = max([i + 1 for i in ends if i < at], default=0)
    draft.move(section, at, between(rng, min(floor, at - 1), at - 1))
    return True


def earlier_wait(draft: Draft, rng: random.Random) -> bool:
    place = pick(rng, draft.places("wait"))
    if place is None:
        return False
    section, at = place
    gathers = [i for i in draft.touching(section, draft.at(place).param, "gather") if i < at]
    if not gathers:
        return False
    draft.move(section, at, between(rng, gathers[-1] + 1, at))
    return True


def later_release(draft: Draft, rng: random.Random) -> bool:
    place = pick(rng, draft.places("release"))
    if place is None:
        return False
    section, at = place
    draft.move(section, at, between(rng, at, len(draft.code[section]) - 1))
    return True


def skip_release(draft: Draft, rng: random.Random) -> bool:
    place = pick(rng, draft.places("release"))
    if place is None:
        return False
    del draft.code[place[0]][place[1]]
    return True


def skip_second_gather(draft: Draft, rng: random.Random) -> bool:
    """Keep a parameter whole between two uses in one section."""
    found = []
    for section, at in draft.places("release"):
        param = draft.at((section, at)).param
        later = [i for i in draft.touching(section, param, "gather", "wait") if i > at]
        found += [(section, [at, *later[:2]])] if later else []
    chosen = pick(rng, found)
    if chosen is None:
        return False
    for i in reversed(chosen[1]):
        del draft.code[chosen[0]][i]
    return True


def extra_gather(draft: Draft, rng: random.Random) -> bool:
    """Make a parameter whole where nothing needs it; at times give it back."""
    section = pick(rng, range(len(draft.code)))
    param = pick(rng, draft.placement)
    at = between(rng, 0, len(draft.code[section]))
    draft.insert(section, at, Instr("gather", param))
    if rng.random() < 0.7:
        wait = between(rng, at + 1, len(draft.code[section]))
        draft.insert(section, wait, Instr("wait", param))
        if rng.random() < 0.5 and draft.placement[param] == "sharded":
            end = between(rng, wait + 1, len(draft.code[section]))
            draft.insert(section, end, Instr("release", param))
    return True


# ---- gradients and updates


def later_accumulate(draft: Draft, rng: random.Random) -> bool:
    place = pick(rng, draft.places("accumulate"))
    if place is None:
        return False
    draft.move(*place, between(rng, place[1], len(draft.code[place[0]]) - 1))
    return True


def earlier_accumulate(draft: Draft, rng: random.Random) -> bool:
    place = pick(rng, draft.places("accumulate"))
    if place is None:
        return False
    section, at = place
    (reduce,) = draft.touching(section, draft.at(place).param, "reduce")
    draft.move(section, at, between(rng, reduce + 1, at))
    return True


def later_reduce(draft: Draft, rng: random.Random) -> bool:
    place = pick(rng, draft.places("reduce"))
    if place is None:
        return False
    section, at = place
    (done,) = draft.touching(section, draft.at(place).param, "accumulate")
    draft.move(section, at, between(rng, at, done - 1))
    return True


def other_update_order(draft: Draft, rng: random.Random) -> bool:
    section = pick(rng, draft.sections("update"))
    if section is None:
        return False
    at = draft.places("update", "defer", kinds=("update",))
    first, second = rng.choice(at)[1], rng.choice(at)[1]
    code = draft.code[section]
    code[first], code[second] = code[second], code[first]
    return True


def defer(draft: Draft, rng: random.Random) -> bool:
    """Leave an update to the next forward: to an update before the gather, or to the gather."""
    place = pick(rng, draft.places("update", kinds=("update",)))
    if place is None:
        return False
    section, at = place
    param = draft.at(place).param
    draft.code[section][at] = Instr("defer", param)
    if rng.random() < 0.8:  # a gather that stays would apply it at once: right, and pointless
        for i in reversed(draft.touching(section, param, "gather", "wait")):
            del draft.code[section][i]
    if draft.placement[param] != "sharded":
        _gather_before_uses(draft, rng, param)
    if rng.random() < 0.5:
        forward = pick(rng, draft.sections("forward"))
        gathers = draft.touching(forward, param, "gather")
        last = gathers[0] if gathers else len(draft.code[forward])
        draft.insert(forward, between(rng, 0, last), Instr("update", param))
    return True


def _gather_before_uses(draft: Draft, rng: random.Random, param: str) -> None:
    """What is whole anyway is gathered in each section, which applies what was deferred."""
    for section in draft.sections("forward", "backward", "inference"):
        uses = draft.uses(section, param)
        if uses and not [i for i in draft.touching(section, param, "wait") if i < uses[0]]:
            wait = between(rng, 0, uses[0])
            draft.insert(section, wait, Instr("wait", param))
            draft.insert(section, between(rng, 0, wait), Instr("gather", param))


def update_in_backward(draft: Draft, rng: random.Random) -> bool:
    place = pick(rng, draft.places("accumulate"))
    if place is None:
        return False
    section, at = place
    end = between(rng, at + 1, len(draft.code[section]))
    draft.insert(section, end, Instr("update", draft.at(place).param))
    return True


# ---- activations


def rerun(draft: Draft, rng: random.Random) -> bool:
    """Run a forward region again before a backward use of what it made."""
    backward = pick(rng, draft.sections("backward"))
    place = pick(rng, _reruns(draft, backward))
    if place is None:
        return False
    facts = draft.regions[draft.at(place).region]
    users = [
        i for i, instr in enumerate(draft.code[backward]) if draft.reads(instr) & {*facts.outputs}
    ]
    at = between(rng, 0, pick(rng, users)) if rng.random() < 0.5 else pick(rng, users)
    draft.insert(backward, at, draft.at(place))
    for param in facts.params:
        if draft.placement[param] == "sharded":
            after = between(rng, at + 1, len(draft.code[backward]))
            if rng.random() < 0.5:
                draft.insert(backward, after, Instr("release", param))
            draft.insert(backward, at, Instr("gather", param), Instr("wait", param))
            at += 2
    return True


def _reruns(draft: Draft, backward: int | None) -> list[tuple[int, int]]:
    """Runs of the forward whose outputs that backward reads, and which may run again."""
    if backward is None:
        return []
    needed = frozenset().union(*map(draft.reads, draft.code[backward]))
    again = {instr.region for instr in draft.code[backward] if instr.op == "run"}
    return [
        (s, i)
        for s, i in draft.places("run", kinds=("forward",))
        if draft.graphs[s] == draft.graphs[backward]
        and not draft.regions[draft.at((s, i)).region].once
        and draft.at((s, i)).region not in again
        and needed & {*draft.makes(draft.at((s, i)))}
    ]


def offload_values(draft: Draft, rng: random.Random) -> bool:
    """Move saved activations to the host: out in the forward, back in the backward."""
    backward = pick(rng, draft.sections("backward"))
    if backward is None:
        return False
    forward = next(
        s for s in draft.sections("forward") if draft.graphs[s] == draft.graphs[backward]
    )
    first_use: dict[str, int] = {}
    for i, instr in enumerate(draft.code[backward]):
        for value in draft.reads(instr):
            first_use.setdefault(value, i)
    made = {v: i for i, instr in enumerate(draft.code[forward]) for v in draft.makes(instr)}
    moved = {v for _, i in draft.places(*MOVES_VALUES) for v in draft.at((_, i)).values}
    saved = sorted(v for v in made if v in first_use and v not in moved)
    if not saved:
        return False
    values = rng.sample(saved, k=min(len(saved), rng.choice((1, 1, 2, 4))))
    use = min(first_use[v] for v in values)
    back = between(rng, 0, use)
    draft.insert(backward, between(rng, back, use), Instr("await", values=values))
    draft.insert(backward, back, Instr("reload", values=values))
    last = max(
        i
        for i, instr in enumerate(draft.code[forward])
        if {*values} & ({*draft.reads(instr)} | {*draft.makes(instr)})
    )
    out = between(rng, max(made[v] for v in values) + 1, last + 1)
    draft.insert(forward, out, Instr("offload", values=values))
    evict = between(rng, max(last, out) + 2, len(draft.code[forward]))
    draft.insert(forward, min(evict, len(draft.code[forward])), Instr("evict", values=values))
    return True


# ---- optimizer states


def offload_states(draft: Draft, rng: random.Random) -> bool:
    """Out at some point after the update, in before it, at any points of the step."""
    param = pick(rng, draft.trainable)
    if any(draft.at(p).param == param for p in draft.places(*MOVES_STATES)):
        return False
    if not draft.sections("update"):
        return False
    (update,) = draft.sections("update")
    (at,) = draft.touching(update, param, "update", "defer")[:1]
    ops = [Instr(op, param) for op in MOVES_STATES]
    style = rng.randrange(4)
    if style == 0:  # all in the update section, around the update
        if rng.random() < 0.5:
            draft.insert(update, at + 1, ops[0], ops[1])
            draft.insert(update, at, ops[2], ops[3])
        else:  # back at once
            draft.insert(update, at + 1, *ops)
    elif style == 1:  # out while the next forward runs, back while the backward does
        forward, backward = pick(rng, draft.sections("forward")), pick(
            rng, draft.sections("backward")
        )  # fmt: skip
        _scatter(draft, rng, forward, ops[:2])
        _scatter(draft, rng, backward, ops[2:])
    elif style == 2:  # out after the update, back in the backward, awaited before the update
        draft.insert(update, at + 1, ops[0])
        draft.insert(update, at, ops[3])
        _scatter(draft, rng, pick(rng, draft.sections("forward")), ops[1:2])
        _scatter(draft, rng, pick(rng, draft.sections("backward")), ops[2:3])
    else:  # out and never asked back: the update fetches them itself
        section = pick(rng, range(len(draft.code)))
        _scatter(draft, rng, section, ops[:2])
    return True


def _scatter(draft: Draft, rng: random.Random, section: int, instrs: list[Any]) -> None:
    """Put instructions at random places of a section, in their order."""
    at = 0
    for instr in instrs:
        at = between(rng, at, len(draft.code[section]))
        draft.insert(section, at, instr)
        at += 1


# ---- anything


def move_anything(draft: Draft, rng: random.Random) -> bool:
    """A random instruction other than a run to a place nearby."""
    section = pick(rng, range(len(draft.code)))
    at = pick(rng, [i for i, instr in enumerate(draft.code[section]) if instr.op != "run"])
    if at is None:
        return False
    target = max(0, min(len(draft.code[section]) - 1, at + rng.randint(-8, 8)))
    draft.move(section, at, target)
    return True


def drop_anything(draft: Draft, rng: random.Random) -> bool:
    """Leave out a random instruction that is neither a run nor the update's norm."""
    section = pick(rng, range(len(draft.code)))
    kept = ("run", "norm", "reduce", "accumulate")
    at = pick(rng, [i for i, instr in enumerate(draft.code[section]) if instr.op not in kept])
    if at is None:
        return False
    del draft.code[section][at]
    return True


EDITS: dict[str, Edit] = {
    f.__name__: f
    for f in (
        earlier_gather, earlier_wait, later_release, skip_release, skip_second_gather,
        extra_gather, later_accumulate, earlier_accumulate, later_reduce, other_update_order,
        defer, update_in_backward, rerun, offload_values, offload_states, move_anything,
        drop_anything,
    )
}  # fmt: skip
HEAVY = ("rerun", "offload_values", "offload_states", "defer", "update_in_backward")
"""Edits that combine with each other; picked as often as all the others together."""


# ---- plans


@dataclass
class RandomPlan:
    """A plan and how it came about."""

    seed: int
    program: Any
    """The merged step, verified."""
    passes: list[str]
    budget: int
    edits: Counter = field(default_factory=Counter)
    """Accepted edits by name."""

    def __str__(self) -> str:
        edits = " ".join(f"{name}:{count}" for name, count in sorted(self.edits.items()))
        return f"seed {self.seed}: passes {','.join(self.passes)} budget {self.budget}, {edits}"

    def keep(self, folder: Path, name: str) -> Path:
        """Write the program's text, with this plan's history as a comment."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}-seed{self.seed}.txt"
        path.write_text(f"# {self}\n{self.program}", encoding="utf-8")
        return path


def edited(program: Any, rng: random.Random, tries: int) -> tuple[Any, Counter]:
    """The program after up to `tries` random edits, and which of them it took."""
    accepted: Counter = Counter()
    names = list(EDITS)
    for _ in range(tries):
        name = rng.choice(HEAVY if rng.random() < 0.5 else names)
        draft = Draft(program)
        if not EDITS[name](draft, rng):
            continue
        try:
            program = draft.built()
        except UserError:
            continue
        accepted[name] += 1
    return program, accepted


def timed(program: Any, rng: random.Random) -> Any:
    """A copy whose regions take random times, 10 us to 10 ms."""
    program = program.copy()
    for region in program.regions:
        program.set_region_time(region.name, int(10 ** rng.uniform(4, 7)))
    return program


def random_passes(stage_pass: str, rng: random.Random) -> list[str]:
    """Some of the optional passes, in their order, that may follow the stage's."""
    facts = {"regions_timed", *_core.pass_info(stage_pass).contract.provides}
    chosen = []
    for name in OPTIONAL:
        wanted = rng.random() < 0.4
        contract = _core.pass_info(name).contract
        if wanted and facts.issuperset(contract.needs) and facts.isdisjoint(contract.conflicts):
            chosen.append(SYNC if name == "offload_adam_states" and rng.random() < 0.3 else name)
            facts.update(contract.provides)
    return chosen


def random_budget(program: Any, stage_pass: str, rng: random.Random) -> int:
    """Bytes: between a third of what the stage's plan needs and half as much again."""
    planned = program.copy()
    _core.run_passes(planned, [stage_pass])
    return int(_core.memory_timeline(planned)["peak"] * rng.uniform(0.3, 1.5))


def affordable(program: Any, passes: list[str], machine: Any, budget: int) -> tuple[Any, int]:
    """A copy with passes applied under a budget, raised until they find it enough. They may update
    in the backward, where no norm of all gradients comes before."""
    early = not program.clip
    while True:
        planned = program.copy()
        try:
            _core.run_passes(
                planned, passes, machine=machine, memory_budget=budget, early_updates=early
            )
            return planned, budget
        except UserError as error:
            if "budget" not in str(error) or budget > 1 << 40:
                raise
            budget += budget // 4


def random_plan(
    plain: Any, stage_pass: str, seed: int, machine: Any, tries: int = 40
) -> RandomPlan:
    """A valid plan of `plain`, a compute-only whole step. `machine` prices the passes' choices."""
    rng = random.Random(seed)
    program = timed(plain, rng)
    passes = [stage_pass, *random_passes(stage_pass, rng)]
    budget = random_budget(program, stage_pass, rng)
    planned, budget = affordable(program, passes, machine, budget)
    planned, edits = edited(planned, rng, rng.randint(0, tries))
    return RandomPlan(seed, planned, passes, budget, edits)
