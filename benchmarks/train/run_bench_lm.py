# SPDX-License-Identifier: Apache-2.0
"""Trains one condition on this process group, with the seed benchmark's arguments.

    torchrun --nproc-per-node 4 benchmarks/train/run_bench_lm.py --model_name llama-3-8b \\
        --framework fsdp --compile --seq_length 1024
"""

from deepcompile.bench.worker import main

if __name__ == "__main__":
    main()
