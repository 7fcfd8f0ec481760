# SPDX-License-Identifier: Apache-2.0
"""What a sweep tells its workers, and the lines by which it follows their output. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence

from .conditions import Condition
from .options import Options

BEGIN = "[bench] begin "
"""Before a condition, as JSON, when its turn comes."""
STEP_MARK = "Step "
ERROR_MARK = "[bench-error] "
"""Before a rank's failure, as JSON."""


def job_text(conditions: Sequence[Condition], options: Options) -> str:
    """For the worker's --job."""
    return json.dumps({"conditions": [c.as_dict() for c in conditions],
                       "options": options.as_dict()})  # fmt: skip
