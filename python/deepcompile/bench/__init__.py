# SPDX-License-Identifier: Apache-2.0
"""The benchmark suite: conditions and rows, the sweep's runner and its peers, charts."""
