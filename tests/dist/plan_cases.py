# SPDX-License-Identifier: Apache-2.0
"""Many plans on one capture: what the tests of plans run on each rank.

An engine captures its model once. Then plan after plan is installed between steps, and the
training state (weights, masters, moments, step counts, random numbers) is put back to the
first step's, so that each plan can be compared with the stage's plan bit by bit. A plan that
runs all steps is recorded and replayed from the fourth on, on a CPU too (fake_recorder.py); the
stage's plan, which the others must equal, never is.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cases
import torch
from fake_recorder import FakeRecorder
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))

STEPS = 10
TOKENS = 8
STAGE_PASS = {0: "zero0_compile", 1: "zero1_compile", 2: "zero1_compile", 3: "zero3_compile"}
MACHINE = "4xh200"
"""Whose links price the choices of passes; any will do."""


def gpt2_dropout() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=cases.VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32,
            resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1, use_cache=False,
            bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM",
        )
    )  # fmt: skip


def llama_gpu() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512, hidden_size=256, intermediate_size=768, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
            use_cache=False,
        )
    )  # fmt: skip


def mixtral_gpu() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
            num_local_experts=4, num_experts_per_tok=2, use_cache=False,
        )
    )  # fmt: skip


def gpt2_dropout_gpu() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=512, n_embd=256, n_layer=3, n_head=4, n_positions=128,
            resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1, use_cache=False,
            bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM",
        )
    )  # fmt: skip


def llama_deep() -> nn.Module:
    """Of more regions than auto tries one by one."""
    return cases.llama(layers=8)


MODELS = {"llama": cases.llama, "mixtral": cases.mixtral, "gpt2_dropout": gpt2_dropout}
CPU_MODELS = {**MODELS, "llama_deep": llama_deep}
GPU_MODELS = {"llama": llama_gpu, "mixtral": mixtral_gpu, "gpt2_dropout": gpt2_dropout_gpu}


@dataclass(frozen=True)
class Job:
    """One engine and the plans that it runs."""

    model: str
    accumulation: int = 1
    clip: float = 0.0
    stage: int = 3
    alone: int = 0
    """Random plans that each run all STEPS steps."""
    chained: int = 0
    """Random plans that take turns, STEPS / CHAIN steps each, within runs of STEPS."""
    seed: int = 0
    """Seed of the first random plan; the next ones count on."""
    combinations: int = 0
    """1: also every combination of the optional passes, chained, or each alone on a GPU; n: every
    n-th; 0: none."""
    budgets: int = 0
    """Plans of auto's, each under a budget of its own, beside those."""
    gpu: bool = False
    """On GPUs, compiled by Inductor, in bf16."""

    def __str__(self) -> str:
        return (
            f"{self.model} stage {self.stage} accumulation {self.accumulation} clip {self.clip:g}"
        )


CHAIN = 5
AUTO_BUDGETS = 9
"""How many plans of auto's are tried beside the combinations."""


def start(job: Job, world: int) -> Any:
    """An engine for a job, not yet compiled."""
    import deepcompile
    from deepcompile import cuda_graphs

    if not job.gpu:
        cuda_graphs.recorder = lambda setting, device: FakeRecorder()
    torch.manual_seed(7)
    config = {
        "train_batch_size": world * job.accumulation,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": job.accumulation,
        "gradient_clipping": job.clip,
        "optimizer": {"type": "AdamW", "params": cases.ADAMW},
        # Attention's weights are packed and kept whole, the rest is sharded.
        "zero_optimization": {"stage": job.stage, "stage3_param_persistence_threshold": 1100},
        "compile": {"region_bytes": 12_000},
    }
    if job.gpu:
        config["bf16"] = {"enabled": True}
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 10_000
        config["compile"] = {"differentiable_outputs": "loss", "region_bytes": 1 << 20}
    model = (GPU_MODELS if job.gpu else CPU_MODELS)[job.model]().train()
    return deepcompile.initialize(model=model, config=config)[0]


def batch(job: Job, step: int, micro: int, rank: int) -> torch.Tensor:
    """One rank's micro-batch of token ids."""
    generator = torch.Generator().manual_seed(step * 1000 + micro * 100 + rank)
    shape, vocabulary = ((1, 128), 512) if job.gpu else ((1, TOKENS), cases.VOCABULARY)
    ids = torch.randint(0, vocabulary, shape, generator=generator)
    return ids.cuda() if job.gpu else ids


def raw(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes, of any type on any device."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@dataclass
class Outcome:
    """What a run of STEPS steps came to on this rank."""

    losses: list[float] = field(default_factory=list)
    """Of every micro-batch."""
    norms: list[float | None] = field(default_factory=list)
    digest: str = ""
    """Of weights, masters, moments, step counts and the random number generator."""

    def difference(self, expected: Outcome) -> str | None:
        """What differs first, in words."""
        for what in ("losses", "norms"):
            pairs = zip(getattr(self, what), getattr(expected, what), strict=True)
            for at, (mine, theirs) in enumerate(pairs):
                if mine != theirs:
                    return f"{what}[{at}] is {mine!r} instead of {theirs!r}"
        return None if self.digest == expected.digest else "the states after the last step differ"


class Bench:
    """One engine, its captured step, and its state at the first step."""

    def __init__(self, job: Job, rank: int, world: int):
        self.job, self.rank, self.world = job, rank, world
        self.engine = start(job, world)
        self.engine.compile(
            backend="inductor" if job.gpu else "eager", schedule=[(0, [STAGE_PASS[job.stage]])]
        )
        self._saved = self._state()
        self.steps(0, 2)  # captures, and makes buffers that the first step makes
        (self.installed,) = self.engine.planner.graphs
        self.update = self._plain_update()
        self.plain = _core().merge_steps("plan", [self.installed.plain], self.update)

    def _plain_update(self) -> Any:
        from deepcompile.capture.program import update_program

        program, like = update_program(self.engine.table), self.installed.plain
        for header in ("world", "accumulation", "clip", "boundary", "reduce_dtype"):
            setattr(program, header, getattr(like, header))
        return program

    def _state(self) -> list[tuple[torch.Tensor | int, ...]]:
        kinds = ("weight", "master", "exp_avg", "exp_avg_sq")
        pieces = self.engine.runtime.pieces()
        return [
            (piece["member"], piece["step"], *(None if piece[k] is None else piece[k].clone()
                                               for k in kinds))
            for piece in pieces
        ]  # fmt: skip

    def reset(self) -> None:
        """Back to the first step; whatever the last plan left away or deferred comes in."""
        runtime = self.engine.runtime
        runtime.settle()
        for piece, (member, step, *tensors) in zip(runtime.pieces(), self._saved, strict=True):
            assert piece["member"] == member
            kinds = ("weight", "master", "exp_avg", "exp_avg_sq")
            for kind, tensor in zip(kinds, tensors, strict=True):
                if tensor is not None:
                    piece[kind].copy_(tensor)
            runtime.set_member_step(member, step)
        runtime.masters_changed()
        runtime.set_step(0)
        self.engine.zero_grad()
        torch.manual_seed(100 + self.rank)

    def install(self, program: Any) -> None:
        """Let a whole-step program be the plan from the next call on, by the planner's own way."""
        from deepcompile.agreement import Agreed

        planner, plain = self.engine.planner, self.installed.plain
        graph, update = _core().split_step(program, [plain], self.update)
        agreed = Agreed({_core().skeleton(plain): str(graph)}, str(update), ["test"])
        planner.adopt(agreed, self.engine.global_steps, "test", time.perf_counter())

    def steps(self, first: int, last: int, into: Outcome | None = None) -> None:
        into, engine = into or Outcome(), self.engine
        for step in range(first, last):
            for micro in range(self.job.accumulation):
                ids = batch(self.job, step, micro, self.rank)
                loss = cases.loss_of(engine, ids)
                engine.backward(loss)
                engine.step()
                into.losses.append(float(loss.detach()))
            into.norms.append(engine.get_global_grad_norm())

    def run(self, programs: list[Any]) -> Outcome:
        """STEPS steps from the start, shared out between the programs in turn."""
        self.reset()
        outcome, each = Outcome(), STEPS // len(programs)
        for turn, program in enumerate(programs):
            self.install(program)
            self.steps(turn * each, (turn + 1) * each, outcome)
        outcome.digest = self.digest()
        return outcome

    def digest(self) -> str:
        found = hashlib.sha256()
        for _, step, *tensors in self._state():
            found.update(str(step).encode())
            for tensor in tensors:
                found.update(b"" if tensor is None else raw(tensor))
        for name, tensor in sorted(self.engine.state_dict().items()):
            found.update(name.encode() + raw(tensor))
        found.update(raw(torch.get_rng_state()))
        if self.job.gpu:
            found.update(raw(torch.cuda.get_rng_state()))
        return found.hexdigest()

    def compilations(self) -> tuple:
        """Counts that a compilation of any kind would change."""
        counters = torch._dynamo.utils.counters
        return (
            counters["stats"]["unique_graphs"], counters["frames"]["total"],
            len(self.engine.planner.graphs), self.engine.compile_report()["regions"],
        )  # fmt: skip


def _core() -> Any:
    from deepcompile import _core

    return _core


@dataclass
class Named:
    """A plan made by named passes."""

    program: Any
    passes: list[str]
    seed: int = -1

    def __str__(self) -> str:
        return f"passes {','.join(self.passes)}"

    def keep(self, folder: Path, name: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}-{'+'.join(self.passes)}.txt"
        path.write_text(f"# {self}\n{self.program}", encoding="utf-8")
        return path


def combinations() -> list[list[str]]:
    """Every choice of optional passes, each with both forms of moving states; `coalesce`, which
    looks at no choice of the others, ends every second."""
    from random_plans import OPTIONAL, SYNC

    others = [name for name in OPTIONAL if name != "coalesce"]
    found = []
    for size in range(1, len(others) + 1):
        for chosen in itertools.combinations(others, size):
            found.append(list(chosen))
            if "offload_adam_states" in chosen:
                found.append([SYNC if n == "offload_adam_states" else n for n in chosen])
    for names in found[::2]:
        names.append("coalesce")
    return found


class Comparison:
    """Runs a job's plans and says which of them went wrong, and how."""

    def __init__(self, job: Job, rank: int, world: int, folder: Path):
        self.job, self.rank, self.folder = job, rank, folder
        self.name = f"{job.model}-s{job.stage}a{job.accumulation}c{job.clip:g}w{world}"
        self.bench = Bench(job, rank, world)
        self.ranks = self.bench.engine.ranks
        self.machine = _core().Machine.builtin(MACHINE)
        self.problems: list[str] = []
        stage = self.bench.plain.copy()
        _core().run_passes(stage, [STAGE_PASS[job.stage]])
        self.stage = stage
        # Installed so often that no two steps in a row are alike.
        self.expected = self.bench.run([stage] * CHAIN)
        assert not self.bench.engine.runtime.replays()["replayed"]

    def _agreed(self, make: Any) -> list[Any]:
        """Rank 0's plans on every rank: their programs travel as text."""
        mine = make() if self.rank == 0 else []
        texts = self.ranks.from_first([(str(p.program), str(p)) for p in mine])
        if self.rank == 0:
            for plan in mine:
                plan.keep(self.folder, self.name)
            return mine
        return [Named(_core().StepProgram.parse(text), [said]) for text, said in texts]

    def _run(self, plans: list[Any]) -> str | None:
        """What went wrong on any rank."""
        said = " then ".join(map(str, plans))
        (self.folder / f"running-{self.rank}").write_text(f"{self.job}: {said}")
        try:
            found = self.bench.run([p.program for p in plans]).difference(self.expected)
        except Exception as error:
            raise AssertionError(f"{self.job}: {said}\nkept in {self.folder}: {error}") from error
        found = next((f"rank {r}: {x}" for r, x in enumerate(self.ranks.gather(found)) if x), None)
        return None if found is None else f"{self.job}: {said}\n  {found} (kept in {self.folder})"

    def check(self, plans: list[Any], chain: int) -> None:
        """Compare plans with the stage's, `chain` of them in a run."""
        for at in range(0, len(plans), chain):
            turn = plans[at : at + chain]
            problem = self._run(list(itertools.islice(itertools.cycle(turn), chain)))
            if problem is None:
                continue
            alone = [self._run([plan]) for plan in turn] if chain > 1 else []
            self.problems += [p for p in alone if p] or [problem]

    def random(self) -> list[Any]:
        from random_plans import random_plan

        job = self.job
        return [
            random_plan(self.bench.plain, STAGE_PASS[job.stage], job.seed + i, self.machine)
            for i in range(job.alone + job.chained)
        ]

    def named(self) -> list[Any]:
        """All combinations of passes, and auto, each under a budget of its own."""
        from random_plans import affordable, random_budget, timed

        stage_pass = STAGE_PASS[self.job.stage]
        chosen = []
        if self.job.combinations:
            chosen = [[stage_pass, *names] for names in combinations()] + [["auto"]] * AUTO_BUDGETS
        chosen = list(enumerate(chosen))[:: self.job.combinations or None]
        chosen += [(1000 + at, ["auto"]) for at in range(self.job.budgets)]
        found = []
        for at, passes in chosen:
            rng = random.Random(at)
            program = timed(self.bench.plain, rng)
            budget = random_budget(program, stage_pass, rng)
            program, budget = affordable(program, passes, self.machine, budget)
            found.append(Named(program, [*passes, f"{budget}B"]))
        return found


def updates_early(program: Any) -> bool:
    """Whether a backward of it updates."""
    return any(
        instr.op == "update"
        for section in program.sections
        if section.kind == "backward"
        for instr in section.instrs
    )


def compare(rank: int, world: int, jobs: list[Job], folder: str) -> list[dict[str, Any]]:
    """All plans of all jobs; what each job came to."""
    results = []
    for job in jobs:
        torch._dynamo.reset()
        began = time.monotonic()
        comparison = Comparison(job, rank, world, Path(folder))
        before, captured = comparison.bench.compilations(), time.monotonic()
        plans = comparison._agreed(comparison.random) if job.alone + job.chained else []
        combined = comparison._agreed(comparison.named) if job.combinations + job.budgets else []
        planned = time.monotonic()
        comparison.check(plans[: job.alone], 1)
        comparison.check(plans[job.alone :], CHAIN)
        comparison.check(combined, 1 if job.gpu else CHAIN)
        results.append({
            "job": str(job), "problems": comparison.problems, "plans": len(plans),
            "combinations": len(combined),
            "early": sum(updates_early(plan.program) for plan in combined),
            "compilations": (before, comparison.bench.compilations()),
            "losses": comparison.expected.losses,
            "replayed": comparison.bench.engine.runtime.replays()["replayed"],
            "once": sum(region.once for region in comparison.bench.plain.regions),
            "seconds": [round(x, 1) for x in
                        (captured - began, planned - captured, time.monotonic() - planned)],
        })  # fmt: skip
    return results
