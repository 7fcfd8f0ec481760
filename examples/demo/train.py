# SPDX-License-Identifier: Apache-2.0
"""Trains a small Llama on text, byte by byte, with sharded parameters.

    torchrun --nproc-per-node 2 examples/demo/train.py

On a machine with GPUs the same command uses them, one a process. The text is
the Python standard library's sources unless --data names a folder.

What deepcompile adds to a plain training script is in `main`: initialize,
compile, and the engine's backward and step.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path

# Without a GPU, torch warns in each process that a CUDA toolkit is of no use.
os.environ.setdefault("TORCH_LOGS", "-torch.utils.cpp_extension")

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import deepcompile
from deepcompile.data import VOCABULARY, ByteDataset, decode, encode, read_folder
from progress import Progress

HERE = Path(__file__).resolve().parent
RANK = int(os.environ.get("RANK", "0"))
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
PROMPT = "def read_"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=HERE / "ds_config.json")
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    parser.add_argument("--data", type=Path, help="folder of .py files; default: Python's own")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps in all")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--sequence", type=int, default=128, help="bytes a sample")
    parser.add_argument("--sample-bytes", type=int, default=160, help="length of the text samples")
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    arguments = parser.parse_args()
    for name in ("steps", "layers", "save_every"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return arguments


def build_model(arguments: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama small enough for two CPU cores; the same weights on every rank."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=arguments.hidden,
            intermediate_size=arguments.hidden * 8 // 3 // 16 * 16,
            num_hidden_layers=arguments.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=arguments.sequence,
            use_cache=False,
            tie_word_embeddings=False,
        )
    )


def mean_over_ranks(value: torch.Tensor) -> float:
    value = value.detach().float().clone()
    if dist.is_initialized():
        dist.all_reduce(value)
    return value.item() / WORLD


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


@torch.no_grad()
def validate(engine, dataset: ByteDataset, micro: int, sequence: int, batches: int = 4) -> float:
    """Mean loss over the same held-out batches each time, in nats a byte."""
    engine.eval()
    held = dataset.batches(micro, sequence, split="validation", rank=RANK, world=WORLD)
    losses = [engine(**to_device(next(held), engine.device)).loss for _ in range(batches)]
    engine.train()
    return mean_over_ranks(torch.stack(losses).mean())


@torch.no_grad()
def write_sample(engine, micro: int, sequence: int, length: int) -> str:
    """Text that the model writes after PROMPT.

    Each new byte is one forward over a window of fixed shape, so nothing is
    compiled again. All ranks draw the same bytes: each forward gathers
    parameters from all of them.
    """
    engine.eval()
    draw = torch.Generator().manual_seed(0)
    tokens = encode(PROMPT).tolist()
    while len(tokens) < length:
        seen = tokens[-sequence:]
        window = torch.zeros(micro, sequence, dtype=torch.int64)
        window[:, : len(seen)] = torch.tensor(seen)
        batch = to_device({"input_ids": window, "labels": window.clone()}, engine.device)
        logits = engine(**batch).logits[0, len(seen) - 1].float().cpu()
        chance = torch.softmax(logits / 0.7, dim=-1)
        tokens.append(int(torch.multinomial(chance, 1, generator=draw)))
    engine.train()
    return decode(tokens)


def train(engine, dataset, arguments, micro: int, progress: Progress) -> dict:
    """The training loop. Returns what the report shows of it."""
    batches = dataset.batches(micro, arguments.sequence, rank=RANK, world=WORLD)
    history: dict = {"loss": [], "validation": [], "samples": []}
    checkpoints = arguments.out / "checkpoints"
    first = 0
    if arguments.resume:
        folder, state = engine.load_checkpoint(checkpoints)
        if folder is None:
            raise SystemExit(f"--resume: {checkpoints} holds no checkpoint; leave --resume out")
        batches.load_state_dict(state["batches"])
        history, first = state["history"], state["step"]
        progress.say(f"resumed after step {first}")
    if first >= arguments.steps:
        progress.say(f"nothing to train: step {first} of {arguments.steps} is done")
        return history
    if not history["samples"]:
        progress.say("compiling the forward for evaluation: half a minute on two CPU cores")
        before = write_sample(engine, micro, arguments.sequence, arguments.sample_bytes // 2)
        history["samples"].append({"when": "Before training", "text": before})
        progress.say("compiled; measuring the loss on held-out text")
        held = validate(engine, dataset, micro, arguments.sequence)
        history["validation"].append({"step": first, "loss": held})
        progress.say(f"validation loss {held:.3f} before training")
    tokens = micro * arguments.sequence * WORLD * engine.gradient_accumulation_steps()
    progress.say("compiling forward and backward in the first step: as long again")
    progress.start(first, arguments.steps)
    for step in range(first + 1, arguments.steps + 1):
        start = time.perf_counter()
        losses = []
        for _ in range(engine.gradient_accumulation_steps()):
            loss = engine(**to_device(next(batches), engine.device)).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        value = mean_over_ranks(torch.stack(losses).mean())
        rate = tokens / (time.perf_counter() - start)
        compiled = step > first + 1  # the first step's time is mostly compilation
        history["loss"].append(
            {"step": step, "loss": value, "tokens_per_s": rate if compiled else None}
        )
        progress.step(step, value, rate if compiled else None)
        if step % arguments.save_every == 0 or step == arguments.steps:
            held = validate(engine, dataset, micro, arguments.sequence)
            history["validation"].append({"step": step, "loss": held})
            progress.say(f"step {step}: validation loss {held:.3f}")
            state = {"step": step, "batches": batches.state_dict(), "history": history}
            engine.save_checkpoint(checkpoints, tag=f"step{step}", client_state=state)
    progress.stop()
    progress.say(f"writing a sample of {arguments.sample_bytes} bytes")
    after = write_sample(engine, micro, arguments.sequence, arguments.sample_bytes)
    history["samples"].append({"when": f"After {arguments.steps} steps", "text": after})
    return history


def tool(name: str) -> str:
    """A command of this Python's environment, as one can type it here."""
    path = Path(sys.executable).with_name(name)
    here = path.is_relative_to(Path.cwd())
    return str(path.relative_to(Path.cwd()) if here else path) if path.exists() else name


def resume_command(steps: int) -> str:
    """What goes on from the last checkpoint."""
    arguments, given = [], iter(sys.argv[1:])
    for word in given:
        if word == "--steps":
            next(given)
        elif word != "--resume" and not word.startswith("--steps="):
            arguments.append(word)
    script = os.path.relpath(__file__)
    words = [tool("torchrun"), "--nproc-per-node", str(WORLD), script, *arguments]
    return shlex.join([*words, "--resume", "--steps", str(steps)])


def main() -> None:
    arguments = parse_arguments()
    progress = Progress(quiet=RANK != 0)
    dataset = read_folder(arguments.data)
    model = build_model(arguments)
    count = sum(p.numel() for p in model.parameters())
    progress.say(f"Llama with {count / 1e6:.1f} M parameters on {WORLD} ranks")
    progress.say(f"{dataset.train.numel() / 1e6:.1f} MB of text from {dataset.source}")

    engine, _, _, _ = deepcompile.initialize(model=model, config=str(arguments.config))
    engine.compile()

    micro = engine.train_micro_batch_size_per_gpu()
    history = train(engine, dataset, arguments, micro, progress)

    notes = [] if arguments.steps >= 150 else [f"A shortened run of {arguments.steps} steps."]
    title = f"Llama, {arguments.layers} layers, {count / 1e6:.1f} M parameters, {WORLD} ranks"
    report = arguments.out / "report.html"
    engine.report(report, title=title, notes=notes, **history)
    trace = arguments.out / "trace.json"
    engine.write_trace(trace)
    plan = arguments.out / "plan.txt"
    planned = engine.write_plan(plan)
    if RANK == 0:
        (arguments.out / "history.json").write_text(json.dumps(history, indent=1))
    for sample in history["samples"]:
        progress.show(sample["when"], sample["text"])
    progress.say(f"report    {report.resolve()}")
    progress.say(f"trace     {trace.resolve()}  (open it at ui.perfetto.dev)")
    progress.say(f"resume    {resume_command(2 * arguments.steps)}")
    if planned is not None:
        progress.say(f"why       {tool('deepcompile')} explain {shlex.quote(str(plan))}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
