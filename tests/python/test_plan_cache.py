# SPDX-License-Identifier: Apache-2.0
"""Plans kept between runs, and files that are no use."""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import warnings

import pytest
import torch
from test_engine import batch, step
from test_planning import SEED_STYLE, compiled, history

from deepcompile import _core, plan_cache
from deepcompile.agreement import Agreed
from deepcompile.links import builtin_text
from deepcompile.pass_identity import identity
from deepcompile.passes import prefetch
from deepcompile.planning import Planner
from deepcompile.schedule import check_schedule

FACTS = {"params": [], "world": 2}


def kept() -> plan_cache.Kept:
    plan = "step x world=2\n"
    agreed = Agreed({"s": plan}, plan, ["auto"], reasons=[("auto", "", "why")])
    return plan_cache.Kept(agreed, _core.CostTable(2).serialize(), {"k": [7, 64]})


def test_round_trip(tmp_path):
    path = plan_cache.write(str(tmp_path / "new"), FACTS, kept())
    assert path.name == plan_cache.job_key(FACTS) + ".json"
    assert plan_cache.read(str(path.parent), FACTS) == kept()
    assert plan_cache.read(str(path.parent), FACTS | {"world": 4}) is None
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def changed(path, edit) -> None:
    table = json.loads(path.read_text())
    edit(table)
    path.write_text(json.dumps(table))


def agreed_otherwise(path, **fields) -> None:
    """Change the plan, with a checksum that fits."""

    def edit(table) -> None:
        body = json.loads(table["body"])
        body["kept"]["agreed"] |= fields
        table["body"] = json.dumps(body, sort_keys=True)
        table["sum"] = hashlib.sha256(table["body"].encode()).hexdigest()

    changed(path, edit)


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (lambda p: p.write_text("{"), "not valid JSON"),
        (lambda p: p.write_text("[1]"), "not a file of this cache"),
        (lambda p: p.write_bytes(b"\xff\xfe"), "is ignored"),
        (lambda p: changed(p, lambda t: t.update(format=99)), "has format 99, not 2"),
        (lambda p: changed(p, lambda t: t.update(body=t["body"] + " ")), "checksum is wrong"),
        (lambda p: changed(p, lambda t: t.pop("body")), "lacks 'body'"),
        (lambda p: changed(p, lambda t: t.update(body=None)), "is ignored"),
        (lambda p: p.write_text("[" * 100_000), "is ignored"),
        (lambda p: (p.unlink(), p.mkdir()), "is ignored"),
        (lambda p: agreed_otherwise(p, programs={"s": "garbage"}), "not with 'garbage'"),
        (lambda p: agreed_otherwise(p, update="step"), "is ignored"),
    ],
)
def test_files_that_are_no_use_are_named(tmp_path, spoil, cause):
    path = plan_cache.write(str(tmp_path), FACTS, kept())
    spoil(path)
    with pytest.warns(UserWarning, match=cause):
        assert plan_cache.read(str(tmp_path), FACTS) is None


def test_a_file_of_another_job(tmp_path):
    path = plan_cache.write(str(tmp_path), FACTS, kept())
    other = FACTS | {"world": 4}
    path.rename(plan_cache.path_of(str(tmp_path), plan_cache.job_key(other)))
    with pytest.warns(UserWarning, match="it is of job"):
        assert plan_cache.read(str(tmp_path), other) is None


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be written"):
        assert plan_cache.write(str(tmp_path / "file" / "x"), FACTS, kept()) is None


def test_the_key_covers_what_plans_depend_on():
    engine = compiled(schedule=SEED_STYLE)
    planner = engine.planner

    def key(schedule=planner.schedule, backend="eager"):
        return plan_cache.job_key(
            plan_cache.job(engine.table, engine.config, engine.ranks, schedule, backend)
        )

    def one(program, context):
        return 1

    def two(program, context):
        return 2

    passes = (["zero3_compile", f] for f in (one, two))
    keys = [key(), key(backend="inductor")]
    keys += [key(check_schedule([(0, each)], 3, {})) for each in passes]
    assert key() == key() and len(set(keys)) == 4


def test_the_key_covers_the_machine(monkeypatch, tmp_path):
    def key(**settings):
        engine = compiled(schedule=SEED_STYLE, compile=settings)
        facts = plan_cache.job(
            engine.table, engine.config, engine.ranks, engine.planner.schedule, "eager"
        )
        return plan_cache.job_key(facts)

    (tmp_path / "mine.json").write_text(builtin_text("2x-cpu"))
    mine = key(machine=str(tmp_path / "mine.json"))
    keys = [key(), key(machine="4xh200"), key(machine="4x8-a100"), mine]
    (tmp_path / "mine.json").write_text(builtin_text("2x-cpu") + " ")
    keys.append(key(machine=str(tmp_path / "mine.json")))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "7")
    assert len({*keys, key()}) == 6


class Keep:
    """A pass as an object."""

    def __init__(self, many):
        self.many = many

    def __call__(self, program, context):
        pass

    def method(self, program, context):
        pass


class Drop(Keep):
    pass


def made(many, inner=None):
    def keeps(program, context):
        return many, inner

    return keeps


def test_passes_are_told_apart_by_all_that_they_hold():
    def itself(program, context):
        return itself

    def make():
        return [
            "prefetch", prefetch.schedule_prefetch.__class__("coalesce", "elsewhere"),
            Keep(1), Keep(2), Drop(1), Keep, Keep(1).method, Keep(2).method, made(1), made(2),
            made(1, made(1)), made(1, made(2)), functools.partial(made(1), n=1),
            functools.partial(made(1), n=2), functools.partial(made(2), n=1), itself, len,
        ]  # fmt: skip

    first, second = ([identity(pass_) for pass_ in make()] for _ in range(2))
    assert first == second and len(set(first)) == len(first)
    assert identity(prefetch.schedule_prefetch) == "prefetch"  # however it is written
    assert identity(made(object())) != identity(made(object()))  # cannot be known: never the same


MODULE = """\
HEAD = {head!r}
def helper(program):
    return {number}
def keep(program, context):
    return HEAD, inner(program)
def inner(program):
    return helper(program), keep
class Keeps:
    def __call__(self, program, context):
        return keep
"""


def test_passes_are_told_apart_by_what_they_read_of_their_module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)

    def identities(name, **values):
        (tmp_path / f"{name}.py").write_text(MODULE.format(**values))
        module = importlib.import_module(name)
        found = [identity(each) for each in (module.keep, module.Keeps, module.Keeps())]
        return [text.replace(name, "") for text in found]

    first = identities("first_", head="a", number=1)
    assert first == identities("second_", head="a", number=1)
    for at, values in enumerate(({"head": "b", "number": 1}, {"head": "a", "number": 2})):
        others = identities(f"other_{at}", **values)
        assert not set(others) & set(first)


def test_passes_of_libraries_are_told_apart_by_their_files(tmp_path):
    from deepcompile.passes.named import NamedPass

    native = type("Loaded", (), {"name": "mine", "summary": ""})()
    files = [tmp_path / "a.so", tmp_path / "b.so"]
    for file, text in zip(files, ("one", "two"), strict=True):
        file.write_text(text)
    one, two = (identity(NamedPass(native, "", library=os.fspath(file))) for file in files)
    assert one != two and one.startswith("mine of ")


@pytest.mark.parametrize("schedule", [SEED_STYLE, "auto"])
def test_a_run_starts_with_the_plan_of_the_last(tmp_path, schedule):
    settings = {"compile": {"plan_cache": str(tmp_path)}}
    first = compiled(schedule=schedule, **settings)
    losses = [step(first, n) for n in range(6)]
    second = compiled(schedule=schedule, **settings)
    again = [step(second, 0)]
    assert second.planner.graphs[0].plan_hash == first.planner.graphs[0].plan_hash
    again += [step(second, n) for n in range(1, 6)]
    assert again == losses and history(second)[0] == (0, "plan cache")
    assert schedule == "auto" or len(history(second)) == 1
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])


def test_what_was_measured_of_regions_is_known_to_the_next_run(tmp_path):
    """For planning anew, where memory runs out before a step was profiled."""
    settings = {"compile": {"plan_cache": str(tmp_path)}}
    first = compiled(schedule=SEED_STYLE, **settings)
    for number in range(3):
        step(first, number)
    planner = first.planner
    for n, cost in enumerate(planner.profile.costs.values()):
        cost.workspace = 4096 * n  # a CPU's allocator says nothing
    plan_cache.write(str(tmp_path), planner._job, planner._kept(planner.agreed))
    second = compiled(schedule=SEED_STYLE, **settings)
    step(second)
    assert planner.profile.costs and second.planner.profile_without_trace(0).costs == (
        planner.profile.costs
    )


def test_a_kept_plan_of_another_model_is_dropped(tmp_path):
    settings = {"compile": {"plan_cache": str(tmp_path)}}
    first = compiled(schedule=SEED_STYLE, **settings)
    for number in range(3):
        step(first, number)
    (path,) = tmp_path.iterdir()
    programs = json.loads(json.loads(path.read_text())["body"])["kept"]["agreed"]["programs"]
    agreed_otherwise(path, programs={"0" * 16: next(iter(programs.values()))})
    twin = compiled(schedule=[(0, ["zero3_compile"])])
    second = compiled(schedule=SEED_STYLE, **settings)
    with pytest.warns(UserWarning, match="does not know graph 0"):
        losses = [step(second, 0)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses += [step(second, n) for n in range(1, 4)]
    assert losses == [step(twin, n) for n in range(4)]
    whys = [why for _, why in history(second)]
    assert whys[:2] == ["plan cache", "the kept plan did not fit"] and len(whys) == 3


def test_a_kept_plan_of_other_shapes_is_made_anew(tmp_path):
    """It holds until a step was profiled; a run of the same shapes keeps it."""
    settings = {"compile": {"plan_cache": str(tmp_path)}}

    def run(rows: int) -> list[tuple[int, str]]:
        engine = compiled(schedule=SEED_STYLE, **settings)
        for number in range(4):
            loss = engine(batch(number).repeat(rows, 1)).pow(2).mean()
            engine.backward(loss)
            engine.step()
        return history(engine)

    kept = (0, "plan cache")
    assert run(1) == [(2, "profile of step 2")]
    assert run(1) == [kept]
    assert run(5)[0] == kept and len(plan_files := list(tmp_path.iterdir())) == 1
    planned = json.loads(json.loads(plan_files[0].read_text())["body"])["kept"]["regions"]
    assert run(5) == [kept]
    assert run(1)[0] == kept
    again = json.loads(json.loads(plan_files[0].read_text())["body"])["kept"]["regions"]
    assert again.keys() != planned.keys()


def test_a_kept_plan_that_is_too_large_now_is_not_taken(tmp_path, monkeypatch):
    settings = {"compile": {"plan_cache": str(tmp_path)}}
    first = compiled(schedule=SEED_STYLE, **settings)
    for number in range(3):
        step(first, number)
    peak = first.planner.agreed.predicted_peak
    monkeypatch.setattr(Planner, "agree_budget", lambda self: peak)
    assert history(compiled(schedule=SEED_STYLE, **settings)) == [(0, "plan cache")]
    monkeypatch.setattr(Planner, "agree_budget", lambda self: peak - 1)
    with pytest.warns(UserWarning, match="the kept plan takes 0.00 GiB, and there are"):
        assert history(compiled(schedule=SEED_STYLE, **settings)) == []
