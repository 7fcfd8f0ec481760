# SPDX-License-Identifier: Apache-2.0
"""Arguments of run_bench_lm.py and run.sh, as the seed benchmark's users know them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from .. import _core
from ..cli.arguments import Parser, comma_separated, not_negative, positive, positive_number
from ..errors import UserError
from .conditions import SETTINGS, Condition, model_file_word
from .options import ATTENTION, Options, engine_settings, merge
from .variants import check

FRAMEWORKS = ("deepcompile", "deepspeed", "fsdp", "ddp", "singlegpu")
"""run.sh's --backend; `deepcompile` is this project."""
DEEPSPEED_PASSES = (
    "prefetch", "selective_gather", "offload_adam_states", "offload_adam_states_sync"
)  # fmt: skip
SYNC = ("sync-before-reduce", "sync-after-reduce", "sync-before-allgather", "sync-after-allgather")


def framework_key(framework: str, compiled: bool, deepcompile: bool, stage: int) -> str:
    """A key of conditions.FRAMEWORKS."""
    if framework == "deepcompile":
        return framework
    if deepcompile and framework != "deepspeed":
        raise UserError(
            f"[bench] deepcompile: is DeepSpeed's own compiler here, and the framework is "
            f"{framework}. Give --framework deepcompile for this project's engine."
        )
    if framework == "deepspeed":
        if deepcompile:
            return "ds_deepcompile"
        if stage not in (1, 3):
            raise UserError(
                f"[bench] zero_stage {stage}: DeepSpeed is compared at 1 and 3. Give one of them; "
                "--framework ddp shards nothing, as its stage 0."
            )
        framework = f"zero{stage}"
    name = {"singlegpu": "single"}.get(framework, framework)
    return name + ("_c" if compiled else "")


def check_passes(passes: Sequence[str], framework: str) -> tuple[str, ...]:
    """Raises UserError for names that the framework does not know, or that do not combine."""
    if not passes:
        return ()
    if framework == "deepcompile":
        known: Sequence[str] = _core.pass_names()
    elif framework == "ds_deepcompile":
        known = DEEPSPEED_PASSES
        alone = [p for p in passes if p.startswith("offload_adam_states")]
        if alone and len(passes) > 1:
            raise UserError(f"[bench] passes: DeepSpeed's {alone[0]} goes alone. Give it alone.")
    else:
        raise UserError(f"[bench] passes: {framework} has none. Leave --passes out.")
    for name in passes:
        if name not in known:
            raise UserError(f"[bench] passes: no pass named {name!r}. Use {', '.join(known)}.")
    return tuple(passes)


def attention(text: str) -> str:
    """As attn_impl takes it. The seed's default is misspelt."""
    if text == "spda":
        print("[bench] attn_impl spda: taken as sdpa, which it stands for", file=sys.stderr)
        return "sdpa"
    return text


def learning_arguments(parser: argparse.ArgumentParser, unclipped: str = "") -> None:
    """What Options takes. `unclipped`: the suites that do not clip."""
    add, default = parser.add_argument, Options()
    shown = "default: %(default)s"
    but = f"; {unclipped}: 0" if unclipped else ""
    add("--learning_rate", type=float, default=default.learning_rate, help=shown)
    add("--max_grad_norm", type=float, default=default.max_grad_norm,
        help=f"0: no clipping; {shown}{but}")  # fmt: skip
    add("--dataset_name", "--dataset", help="a Hugging Face data set; default, and where it "
        "cannot be read: local text")  # fmt: skip
    add("--num_epochs", type=positive, default=default.num_epochs, help=shown)
    add("--bench_step", type=positive, default=default.bench_step,
        help=f"optimizer steps in all; {shown}, or the suite's")  # fmt: skip
    add("--warmup_step", type=not_negative, default=default.warmup_step,
        help=f"the first of them, which are not measured; {shown}, or the suite's")  # fmt: skip
    add("--in_a_row", type=not_negative, default=default.in_a_row, help="steps after those, run "
        f"without waiting for the device between them (GPUs); 0: none; {shown}")  # fmt: skip
    add("--print_interval", type=positive, default=default.print_interval, help=shown)
    add("--attn_impl", type=attention, choices=ATTENTION, default=default.attn_impl, help=shown)
    add("--profile", action="store_true", help="trace the last three steps of the "
        "warm-up; ours also writes its report and the step beside its simulation")  # fmt: skip
    add("--profile_dir", default=os.environ.get("PROFILE_DIR") or default.profile_dir,
        help="folder of traces and results; default: $PROFILE_DIR or profiles")  # fmt: skip
    add("--result_dir", default="", help="folder of results, if another")
    add("--eval", action="store_true", help="the loss without gradients too, after the steps")
    add("--deterministic", action="store_true", help="only kernels that repeat their bits")
    add("--save_weights", action="store_true", help="write the first weights")
    add("--load_weights", action="store_true", help="begin with those that were written")
    add("--engine_config", metavar="JSON", help="text or file, merged into the engine's "
        "configuration (deepcompile and deepspeed)")  # fmt: skip
    add("--timeout", type=positive_number, default=default.timeout,
        help=f"seconds until a collective that cannot complete is an error; {shown}")  # fmt: skip


def options_from(args: argparse.Namespace, engine: dict[str, Any] | None = None) -> Options:
    given = {name: getattr(args, name) for name in Options().as_dict() if name in vars(args)}
    settings = engine_settings(args.engine_config) if args.engine_config else {}
    return Options(**given, engine=merge(settings, engine or {}))


def lm_parser(prog: str | None = None) -> Parser:
    """run_bench_lm.py's."""
    parser = Parser(
        prog=prog,
        description="Train one condition and write its row. Start it with torchrun.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model_name", default="meta-llama/Meta-Llama-3-8B",
        help="a Hugging Face name, a folder, a config.json or a built-in name")  # fmt: skip
    add("--num_layers", type=not_negative, default=0, help="cut the model; 0: as it is")
    add("--batch_size", type=positive, default=1)
    add("--seq_length", type=positive, default=512)
    add("--gradient_accumulation_steps", type=positive, default=1)
    add("--activation_checkpointing", action="store_true", help="recompute in the backward")
    add("--framework", choices=FRAMEWORKS, default="deepcompile")
    add("--zero_stage", type=int, choices=range(4), default=3)
    add("--compile", action="store_true", help="torch.compile; deepcompile always does")
    add("--deepcompile", action="store_true", help="DeepSpeed's own compiler of that name")
    add("--backend", choices=("inductor", "eager"), default="inductor")
    add("--passes", type=comma_separated, default=[], help="of the two DeepCompiles: a,b")
    add("--offload_opt_states", action="store_true", help="optimizer states on the host: "
        "deepspeed, fsdp; ours by --memory_budget")  # fmt: skip
    add("--settings", choices=SETTINGS, default="default")
    add("--variant", default="", help="fsdp: prefetch, copy_engine, overlap; "
        "deepcompile: name=TEXT, which only tells rows apart")  # fmt: skip
    add("--memory_budget", metavar="SIZE", help="deepcompile: 20GiB, or a fraction of 1")
    add("--dtype", choices=("auto", "bf16", "fp32"), default="auto",
        help="auto: bf16 on GPUs, fp32 on CPUs")  # fmt: skip
    add("--seed", type=not_negative, default=0)
    learning_arguments(parser)
    return parser


def dtype_of(given: str) -> str:
    import torch

    return given if given != "auto" else "bf16" if torch.cuda.is_available() else "fp32"


def condition_from(args: argparse.Namespace, world: int, nodes: int) -> Condition:
    key = framework_key(args.framework, args.compile, args.deepcompile, args.zero_stage)
    variant = args.variant
    if args.memory_budget:
        if key != "deepcompile":
            raise UserError(f"[bench] memory_budget: {key} has none. Leave it out.")
        variant = ",".join(w for w in (variant, f"budget={args.memory_budget}") if w)
    check(key, args.settings, variant)
    sharded = key.startswith(("zero", "ds_")) or key == "deepcompile"
    found = Condition(
        model=args.model_name,
        framework=key,
        passes=check_passes(args.passes, key),
        variant=variant,
        settings=args.settings,
        num_layers=args.num_layers,
        batch_size=args.batch_size,
        seq_length=args.seq_length,
        accumulation=args.gradient_accumulation_steps,
        zero_stage=args.zero_stage if sharded else 3 if key.startswith("fsdp") else 0,
        activation_checkpointing=args.activation_checkpointing,
        compile=args.compile or key.endswith("deepcompile"),
        backend=args.backend,
        offload_adam=args.offload_opt_states,
        world=world,
        nodes=nodes,
        dtype=dtype_of(args.dtype),
        seed=args.seed,
    )
    reason = found.why_no_offload()
    if reason is not None:
        raise UserError(f"[bench] offload: {reason}.")
    return found


def refuse_engine_settings(condition: Condition, given: Sequence[str]) -> None:
    """Raises UserError where a framework without an engine is given some of these."""
    if given and not condition.has_engine:
        raise UserError(
            f"[bench] {', '.join(given)}: {condition.framework} has no engine to configure; only "
            "deepcompile and deepspeed have. Leave it out."
        )


def parse_lm(argv: Sequence[str], world: int, nodes: int = 1) -> tuple[Condition, Options]:
    args = lm_parser("run_bench_lm.py").parse_args(list(argv))
    condition, options = condition_from(args, world, nodes), options_from(args)
    refuse_engine_settings(condition, ["--engine_config"] if options.engine else [])
    return condition, options


def run_parser() -> Parser:
    """run.sh's. What it does not know is passed on to run_bench_lm.py."""
    parser = Parser(
        prog="run.sh",
        description="Start one condition on all ranks, with a log under logs/. Environment: "
        "NUM_NODES, NGPUS_PER_NODE, HOSTFILE, SLURM, LAUNCH_ARGS, PROFILE_DIR. Other arguments are "
        "run_bench_lm.py's.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--host-ip", help="not needed: the hostfile's first line is where ranks meet")
    add("--backend", choices=FRAMEWORKS, default="deepcompile", help="the framework")
    add("--model", default="meta-llama/Meta-Llama-3-8B")
    add("--zero-stage", default="3")
    add("--batch-size", default="1")
    add("--seq-length", default="512")
    add("--gradient-accumulation-steps", default="1")
    add("--activation-checkpointing", action="store_true")
    add("--compile", action="store_true")
    add("--eager", action="store_true", help="regions run as they are, without Inductor")
    add("--deepcompile", action="store_true", help="with --backend deepspeed: its own compiler")
    add("--passes")
    add("--profile", action="store_true")
    add("--profile-dir")
    add("--num-layers", default="0")
    add("--attn-impl")
    add("--eval", action="store_true")
    add("--ds-offload", action="store_true",
        help="optimizer states on the host: deepspeed, fsdp; ours by --memory_budget")  # fmt: skip
    add("--debug-log", action="store_true")
    for name in SYNC:
        add(f"--{name}", action="store_true", help="DeepSpeed's; ours needs none")
    return parser


def parse_run(argv: Sequence[str], world: int, nodes: int) -> tuple[Condition, Options]:
    """run.sh's arguments as a condition."""
    args, rest = run_parser().parse_known_args(list(argv))
    lm = ["--framework", args.backend, "--model_name", args.model]
    for name in ("zero_stage", "batch_size", "seq_length", "gradient_accumulation_steps",
                 "num_layers", "passes", "profile_dir", "attn_impl"):  # fmt: skip
        value = getattr(args, name)
        if value is not None:
            lm += [f"--{name}", value]
    for name in ("activation_checkpointing", "compile", "deepcompile", "profile", "eval"):
        lm += [f"--{name}"] if getattr(args, name) else []
    lm += ["--backend", "eager"] if args.eager else []
    lm += ["--offload_opt_states"] if args.ds_offload else []
    known = lm_parser("run.sh").parse_args([*lm, *rest])
    switches = [name for name in ("debug-log", *SYNC) if getattr(args, name.replace("-", "_"))]
    condition = condition_from(known, world, nodes)
    config = ["--engine_config"] if known.engine_config else []
    refuse_engine_settings(condition, [f"--{name}" for name in switches] + config)
    waits = [name for name in switches if name in SYNC]
    if condition.ours and waits:
        said = ", ".join(f"--{name}" for name in waits)
        print(f"[bench] {said}: ours needs none, and takes no notice", file=sys.stderr)
        switches = [name for name in switches if name not in SYNC]
    compiled = {name.replace("-", "_"): True for name in switches}
    return condition, options_from(known, {"compile": compiled} if compiled else None)


def log_name(condition: Condition, node: int = 0) -> str:
    """The seed's name of a log, and behind it what the seed has no letter for."""
    words = {"zero": "deepspeed", "ds_": "deepspeed", "single": "singlegpu"}
    key = condition.framework.removesuffix("_c")
    backend = next((w for start, w in words.items() if key.startswith(start)), key)
    model = model_file_word(condition.model)
    deepcompile = int(condition.deepcompile)
    name = (
        f"debug_n{node}_{model}_{backend}_np{condition.world}z{condition.zero_stage}"
        f"c{int(condition.compile)}dc{deepcompile}E{int(condition.backend == 'eager')}"
        f"b{condition.batch_size}seq{condition.seq_length}g{condition.accumulation}"
        f"a{int(condition.activation_checkpointing)}p{'_'.join(condition.passes) or 'ALL'}"
    )
    more = [f"L{condition.num_layers}"] if condition.num_layers else []
    more += ["best"] if condition.settings == "best" else []
    more += ["offload"] if condition.offload_adam or condition.offload_params else []
    more += [condition.variant.replace("/", "-").replace(",", "-")] if condition.variant else []
    more += [condition.dtype] if condition.dtype != "bf16" else []
    more += [f"seed{condition.seed}"] if condition.seed else []
    return "_".join([name, *more]) + ".log"
