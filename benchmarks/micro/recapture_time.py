# SPDX-License-Identifier: Apache-2.0
"""How long does a new plan hold up training whose steps run from CUDA graphs?

A model trains while the schedule changes its plan every few steps; each step is timed by itself,
with a synchronisation on both sides. A new plan costs the planning, then some steps that run
through their regions' code until one is recorded, then that recording. Printed are each step's
milliseconds and what happened in it; at the end what one change cost over the steps that follow.

    python benchmarks/micro/recapture_time.py --layers 16
    torchrun --nproc-per-node 4 benchmarks/micro/recapture_time.py --model llama-3-70b --layers 16
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import deepcompile
from deepcompile.models import build

PLANS = (["zero3_compile"], ["zero3_compile", "prefetch"], ["zero3_compile", "prefetch",
         "selective_gather"], ["auto"])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama-3-8b", help="built-in name or config.json")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--every", type=int, default=12, help="steps with each plan (12)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    if args.every < 8:
        parser.error("--every: a recording takes place in the fifth step of a plan; give 8 or more")
    with torch.device("meta"):
        model = build(args.model, args.layers).to(torch.bfloat16)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": 3},
        "compile": {"loss_only": True},
    }
    engine = deepcompile.initialize(model=model, config=config)[0]
    schedule = [(at * args.every, passes) for at, passes in enumerate(PLANS)]
    engine.compile(schedule=schedule)
    first = engine.ranks.rank == 0
    ids = torch.randint(0, 1000, (1, args.tokens), device=engine.device)
    times: list[float] = []
    plans = recordings = 0
    for step in range(args.every * len(PLANS)):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begun))
        report = engine.compile_report()
        graphs = report["cuda_graphs"]
        said = []
        if report["plans"] > plans:
            said.append(f"planned anew in {report['plan_seconds']:.2f} s so far")
        if graphs["recordings"] > recordings:
            said.append(f"recorded {graphs['runs']} runs, {graphs['bytes'] / 2**20:,.0f} MiB")
        plans, recordings = report["plans"], graphs["recordings"]
        if first:
            print(f"step {step:3}: {times[-1]:9.1f} ms  {'; '.join(said)}", flush=True)
    if not first:
        return
    print(f"{args.model}, {args.layers} layers, {args.tokens} tokens, {engine.ranks.world} x "
          f"{torch.cuda.get_device_name()}, torch {torch.__version__}")  # fmt: skip
    for at, passes in enumerate(PLANS[1:], 1):
        mine = times[at * args.every : (at + 1) * args.every]
        usual = statistics.median(mine[-4:])
        print(f"to {'+'.join(passes)}: {sum(mine) - usual * len(mine):,.0f} ms more than "
              f"{len(mine)} steps of {usual:.1f} ms, the longest {max(mine):,.0f} ms")  # fmt: skip


if __name__ == "__main__":
    main()
