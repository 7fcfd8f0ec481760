# SPDX-License-Identifier: Apache-2.0
"""C++ passes in shared libraries of their own, built with what the package ships."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import deepcompile
from deepcompile import _core
from deepcompile.errors import UserError
from deepcompile.passes import load_library, zero3_compile

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_pass"
pytestmark = pytest.mark.skipif(
    not (shutil.which("cmake") and (shutil.which("c++") or shutil.which("g++"))),
    reason="needs CMake and a C++ compiler",
)
FAILING = """\
// SPDX-License-Identifier: Apache-2.0
#include <stdexcept>
#include "base/error.h"
#include "sim/export_pass.h"
using namespace deepcompile;
struct Fails : Pass {
  std::string_view name() const override { return "fails"; }
  std::string_view summary() const override { return "fails"; }
  Contract contract() const override { return {}; }
  void run(StepProgram&, PassContext&) const override { throw UserError("on \\"purpose\\""); }
};
struct Renames : Fails {
  std::string_view name() const override { return "renames"; }
  void run(StepProgram& program, PassContext&) const override { program.params[0].numel = 1; }
};
struct Lightens : Fails {
  std::string_view name() const override { return "lightens"; }
  void run(StepProgram& program, PassContext&) const override { program.regions[0].workspace = {}; }
};
struct Early : Fails {
  std::string_view name() const override { return "early"; }
  Contract contract() const override { return {.needs = {Fact::kUpdatesPlaced}}; }
  void run(StepProgram&, PassContext& context) const override {
    const PassEnvironment& known = context.environment();
    context.because(std::to_string(known.memory_budget ? known.memory_budget->value : -1) +
                    (known.early_updates ? " early" : "") + (known.estimator ? " priced" : ""));
  }
};
struct Strays : Fails {
  std::string_view name() const override { return "strays"; }
  void run(StepProgram& program, PassContext&) const override {
    program.sections[0].instrs.push_back({Op::kGather, ParamId{99}});
  }
};
struct Forgets : Fails {
  std::string_view name() const override { return "forgets"; }
  void run(StepProgram& program, PassContext&) const override {
    program.sections[0].instrs.push_back({Op::kGather});
  }
};
struct Tries : Fails {
  std::string_view name() const override { return "tries"; }
  void run(StepProgram& program, PassContext& context) const override {
    StepProgram trial = program;
    trial.sections[0].instrs = {{Op::kGather, ParamId{99}}};
    context.environment().simulate(trial);
  }
};
DEEPCOMPILE_PASS(Fails);
DEEPCOMPILE_PASS(Renames);
DEEPCOMPILE_PASS(Lightens);
DEEPCOMPILE_PASS(Early);
DEEPCOMPILE_PASS(Strays);
DEEPCOMPILE_PASS(Forgets);
DEEPCOMPILE_PASS(Tries);
"""
STEP = """\
step train world=2
param a f32 4096
value x 64B
value loss 4B
value t.loss 4B
value ga 16KiB grad=a
region f workspace=4KiB time=10ms (x, a) -> (loss)
region b time=20ms (t.loss, x, a) -> (ga)
forward 0 (x) -> (loss)
  run f
end
backward 0 (t.loss) -> ()
  run b
end
update
end
"""


def build(source: Path, folder: Path) -> Path:
    for command in (
        ["cmake", "-S", str(source), "-B", str(folder)]
        + [f"-DCMAKE_PREFIX_PATH={deepcompile.cmake_dir()}", "-DCMAKE_BUILD_TYPE=Debug"],
        ["cmake", "--build", str(folder)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "custom_pass.so"


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Path:
    return build(EXAMPLE, tmp_path_factory.mktemp("example"))


@pytest.fixture(scope="module")
def failing(tmp_path_factory) -> Path:
    source = tmp_path_factory.mktemp("failing")
    template = (EXAMPLE / "CMakeLists.txt").read_text()
    (source / "CMakeLists.txt").write_text(template.replace("keep_last_gathered", "failing"))
    (source / "failing.cpp").write_text(FAILING)
    return build(source, source / "build")


def test_the_example_runs(example: Path):
    driver = [sys.executable, str(EXAMPLE / "drive.py"), str(example)]
    done = subprocess.run(driver, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "keep_last_gathered a: kept whole into the backward: saves" in done.stdout
    assert "4 gathers are in the step" in done.stdout


def test_its_passes_are_objects_like_others(example: Path):
    (keep,) = load_library(example)
    assert keep.pass_name == "keep_last_gathered" and str(example) in repr(keep)
    assert keep.contract.needs == ["gathers_placed", "reductions_placed"]
    machine = _core.Machine.builtin("2x-cpu")
    program = _core.StepProgram.parse(STEP)
    log = _core.run_passes(program, ["zero3_compile", keep], machine=machine, memory_budget=1 << 20)
    assert [r.pass_name for r in log] == ["zero3_compile", "keep_last_gathered"]
    assert program.reasons[-1].pass_name == "keep_last_gathered"
    with pytest.raises(UserError, match="keep_last_gathered: needs gathers_placed"):
        _core.run_passes(_core.StepProgram.parse(STEP), [keep], machine=machine)


def test_the_library_sees_the_hosts_costs(example: Path):
    """Its own simulation agrees with the host's to the nanosecond."""
    (keep,) = load_library(example)
    machine = _core.Machine.builtin("2x-cpu")
    program = _core.StepProgram.parse(STEP)
    _core.run_passes(program, ["zero3_compile"], machine=machine)
    before = _core.simulate(program, machine).time_ns
    _core.run_passes(program, [keep], machine=machine, memory_budget=1 << 20)
    saved = before - _core.simulate(program, machine).time_ns
    assert f"saves {_core.pretty_nanos(saved)} a step" in program.reasons[-1].text
    with pytest.raises(UserError, match=r"keep_last_gathered \(.*custom_pass.so\): it asks what"):
        _core.run_passes(program, [keep])


def test_errors_name_pass_and_library(failing: Path):
    fails, renames, lightens, early, *invalid = load_library(failing)
    program = _core.StepProgram.parse(STEP)
    with pytest.raises(UserError, match=r'fails \(.*custom_pass.so\): on "purpose"'):
        _core.run_passes(program, [fails])
    for pass_ in (renames, lightens):
        with pytest.raises(UserError, match=r"\(.*\): changed the program's tables"):
            _core.run_passes(program, [pass_])
    _core.run_passes(
        program,
        [zero3_compile.add_z3_gather_release, early],
        memory_budget=123456,
        early_updates=True,
    )
    assert program.reasons[-1].text == "123456 early"
    machine = _core.Machine.builtin("2x-cpu")
    for pass_ in invalid:
        with pytest.raises(UserError, match=rf"{pass_.pass_name} \(.*\): .*unknown operand"):
            _core.run_passes(program, [pass_], machine=machine)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["auto"], "pass 'auto': there is one of that name"),
        (["mine", "mine"], "pass 'mine': there is one of that name"),
        (["a b"], "pass 'a b': is no name"),
    ],
)
def test_passes_of_a_library_have_names_of_their_own(tmp_path: Path, names, words):
    fields = {"summary": "", "needs": [], "provides": [], "conflicts": []}
    texts = ", ".join(json.dumps(json.dumps({"name": n, **fields})) for n in names)
    source, library = tmp_path / "named.cpp", tmp_path / "named.so"
    source.write_text(
        f"static const char* texts[] = {{{texts}}};"
        "static const char* describe(unsigned i) {return texts[i];}"
        "struct T {unsigned abi, count; const char* (*d)(unsigned); void *r, *f;};"
        f"static T table = {{1, {len(names)}, describe, nullptr, nullptr}};"
        'extern "C" void* deepcompile_pass_library(void) {return &table;}'
    )
    subprocess.run(["c++", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    with pytest.raises(UserError, match=words):
        load_library(library)


def test_what_is_no_pass_library_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"/no/such.so: cannot be loaded"):
        load_library("/no/such.so")
    for code, words in (
        ("int other;", "exports no passes"),
        (
            "struct T {unsigned abi, count; void *d, *r, *f;};"
            "static struct T table = {99}; void* deepcompile_pass_library(void) {return &table;}",
            "was built for pass ABI 99, this is 1",
        ),
    ):
        source = tmp_path / f"{len(code)}.c"
        source.write_text(code)
        library = source.with_suffix(".so")
        subprocess.run(
            ["c++", "-x", "c", "-shared", "-fPIC", str(source), "-o", str(library)], check=True
        )
        with pytest.raises(UserError, match=words):
            load_library(library)


def test_the_command_line_takes_a_library(example: Path, tmp_path: Path):
    program = tmp_path / "captured.txt"
    program.write_text(STEP)
    command = [sys.executable, "-m", "deepcompile", "sim", str(program), "--machine", "2x-cpu"]
    command += ["--json", "--pass-library", str(example), "--passes"]
    steps = []
    for names in ("zero3_compile", "zero3_compile,keep_last_gathered"):
        done = subprocess.run([*command, names], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        steps.append(json.loads(done.stdout)["step_ns"])
    assert steps[1] < steps[0]
    done = subprocess.run([*command, "nonsense"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "keep_last_gathered" in done.stderr
