# SPDX-License-Identifier: Apache-2.0
"""Does compile time grow with depth?  Compile the same model at several depths and print a table.

Each depth runs in a fresh process: once with an empty region cache (cold) and
once more with what the first run left on disk (warm). Every distinct region is
compiled once, so the "regions" column grows with depth and the "distinct" and
"compile" columns should not. Nor does tracing (Dynamo, AOTAutograd), unless
``--equal-layers off`` lets it see every layer.

    python benchmarks/micro/compile_depth.py --layers 6,12,24 --repeats 3 --json depth.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile


def measure(layers: int, hidden: int, backend: str, equal_layers: str) -> dict:
    """Train two steps of a Llama of `layers` layers; return its compile report (seconds)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import deepcompile

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        use_cache=False,
    )
    engine, _, _, _ = deepcompile.initialize(
        model=LlamaForCausalLM(config),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            # A tiny model's matrices are below the default threshold: shard them all the same.
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 1024},
            "compile": {"equal_layers": equal_layers},
        },
    )
    engine.compile(backend=backend)
    ids = torch.randint(0, 256, (1, 64))
    for _ in range(2):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    return {"torch": torch.__version__, **engine.compile_report()}


def run_child(layers: int, args: argparse.Namespace, cache: str) -> dict:
    command = [sys.executable, __file__, "--child", str(layers)]
    command += ["--hidden", str(args.hidden), "--backend", args.backend]
    command += ["--equal-layers", args.equal_layers]
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"[compile_depth] {layers} layers failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", default="6,12,24", help="depths, comma separated")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--backend", default="inductor", choices=["inductor", "eager"])
    parser.add_argument("--equal-layers", default="auto", choices=["auto", "off"])
    parser.add_argument("--repeats", type=int, default=1, help="cold and warm pairs per depth")
    parser.add_argument("--json", help="write every row to this file")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child, args.hidden, args.backend, args.equal_layers)))
        return

    print(f"{platform.machine()}, {os.cpu_count()} cores, python {platform.python_version()}")
    print("seconds: median (min-max)")
    head = ("layers", "cache", "regions", "distinct", "from disk", "capture", "compile")
    print("{:>6} {:>6} {:>8} {:>9} {:>10} {:>20} {:>20}".format(*head))
    rows = []
    for layers in (int(x) for x in args.layers.split(",")):
        results: dict[str, list[dict]] = {"cold": [], "warm": []}
        for _ in range(args.repeats):
            with tempfile.TemporaryDirectory() as cache:
                for state in ("cold", "warm"):
                    results[state].append(run_child(layers, args, cache))
        for state, reports in results.items():
            rows += [{"layers": layers, "cache": state, **r} for r in reports]
            compile_ = [r["stages"]["compile"] for r in reports]
            capture = [sum(r["stages"].values()) - r["stages"]["compile"] for r in reports]
            last = reports[-1]
            print(
                f"{layers:>6} {state:>6} {last['regions']:>8} {last['distinct_regions']:>9} "
                f"{last['cache']['disk_hits']:>10} {spread(capture):>20} {spread(compile_):>20}",
                flush=True,
            )
    if args.json:
        with open(args.json, "w") as out:
            json.dump(rows, out, indent=1)


if __name__ == "__main__":
    main()
