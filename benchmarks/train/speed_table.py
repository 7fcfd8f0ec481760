# SPDX-License-Identifier: Apache-2.0
"""FSDP2 (default, best) and ours on W1, W2, W3 in one job. See --help."""

import sys

from deepcompile.bench.table import main

if __name__ == "__main__":
    sys.exit(main())
