# SPDX-License-Identifier: Apache-2.0
"""Plans a step with the pass in ``custom_pass.so``, and with one written in Python.

python drive.py build/custom_pass.so
"""

from __future__ import annotations

import sys

from deepcompile import _core
from deepcompile.passes import PassContext, PassContract, load_library, prefetch, zero3_compile

STEP = """\
step two_layers world=2
param a f32 1048576
param b f32 1048576
value x 4KiB
value h 4KiB
value loss 4B
value t.loss 4B
value d 4KiB
value ga 4MiB grad=a
value gb 4MiB grad=b
region f.a time=10ms (x, a) -> (h)
region f.b time=10ms (h, b) -> (loss)
region b.b time=20ms (t.loss, h, b) -> (d, gb)
region b.a time=20ms (d, x, a) -> (ga)
forward 0 (x) -> (loss)
  run f.a
  run f.b
end
backward 0 (t.loss) -> ()
  run b.b
  run b.a
end
update
end
"""


def count_gathers(program: _core.StepProgram, context: PassContext) -> None:
    """A pass in Python: a function of (program, context). This one only looks."""
    gathers = [i for s in program.sections for i in s.instrs if i.op == "gather"]
    context.because("", f"{len(gathers)} gathers are in the step")


count_gathers.contract = PassContract(needs=["gathers_placed"])


def main(library: str) -> None:
    machine = _core.Machine.builtin("2x-cpu")
    (keep,) = load_library(library)
    for passes in (
        [zero3_compile.add_z3_gather_release],
        [zero3_compile.add_z3_gather_release, keep, count_gathers],
        [zero3_compile.add_z3_gather_release, keep, prefetch.schedule_prefetch],
    ):
        program = _core.StepProgram.parse(STEP)
        _core.run_passes(program, passes, machine=machine, memory_budget=64 << 20)
        sim = _core.simulate(program, machine)
        print(f"{' + '.join(p.__name__ for p in passes)}: {_core.pretty_nanos(sim.time_ns)}")
        for reason in program.reasons:
            if reason.pass_name in (keep.pass_name, "count_gathers"):
                print(f"  {reason.pass_name} {reason.object}: {reason.text}")


if __name__ == "__main__":
    main(sys.argv[1])
