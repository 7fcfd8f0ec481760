# SPDX-License-Identifier: Apache-2.0
"""Charts of results, with the seed's arguments. The same as `deepcompile plot`."""

import sys

from deepcompile.cli.plot import main

if __name__ == "__main__":
    sys.exit(main())
