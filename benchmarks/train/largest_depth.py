# SPDX-License-Identifier: Apache-2.0
"""The largest number of layers that trains, ours and FSDP2's. See --help."""

import sys

from deepcompile.bench.depth import main

if __name__ == "__main__":
    sys.exit(main())
