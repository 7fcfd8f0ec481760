# SPDX-License-Identifier: Apache-2.0
"""The repository's own tools: the checks find what they look for, the total is the total."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import check_includes  # noqa: E402
import check_limits  # noqa: E402
import check_links  # noqa: E402
import check_sizes  # noqa: E402
import check_spdx  # noqa: E402
import config_page  # noqa: E402
import run_tests  # noqa: E402


def write(root: Path, name: str, text: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "include", "message"),
    [
        ("core/ir/a.h", '#include "base/ids.h"', None),
        ("core/ir/a.h", "#include <vector>", None),
        ("core/ir/a.h", '#include "sim/sim.h"', "core/ir may not include core/sim"),
        ("core/plan/a.cpp", "#include <torch/extension.h>", "only core/runtime"),
        ("core/sim/a.cpp", "#include <c10/util/Optional.h>", "only core/runtime"),
        ("core/runtime/exec/a.cpp", "#include <ATen/ATen.h>", None),
        ("core/report/a.cpp", '#include "runtime/trace.h"', "reads records, not the runtime"),
        ("core/extra/a.cpp", "", "is no layer"),
    ],
)
def test_include_check(tmp_path, name, include, message):
    errors = check_includes.check_file(write(tmp_path, name, include + "\n"), tmp_path)
    assert (errors == []) if message is None else (message in errors[0])


def test_size_check(tmp_path):
    def check(name, text):
        return check_sizes.check_file(write(tmp_path, name, text), tmp_path)

    assert check("core/a.h", "\n" * 200) == []
    assert "the limit is 200" in check("core/a.h", "\n" * 201)[0]
    assert "the limit is 500" in check("core/a.cpp", "\n" * 501)[0]
    assert "the limit is 600" in check("tests/core/a_test.cpp", "\n" * 601)[0]
    body = "  x();\n" * 59
    assert check("core/f.cpp", f"void f(int a) {{\n{body[:-7]}}}\n") == []
    assert "f has 61 lines" in check("core/f.cpp", f"void f(int a) {{\n{body}}}\n")[0]
    assert check("core/n.cpp", f"namespace n {{\n{body}{body}}}\n") == []
    lines = "    x()\n" * 60
    assert "f has 61 lines" in check("python/f.py", f"def f():\n{lines}")[0]


def test_licence_check(tmp_path):
    good = write(tmp_path, "a.py", "# SPDX-License-Identifier: Apache-2.0\n")
    assert check_spdx.check_file(good, tmp_path) == []
    assert "SPDX" in check_spdx.check_file(write(tmp_path, "b.py", "x = 1\n"), tmp_path)[0]


def test_link_check(tmp_path):
    write(tmp_path, "docs/b.md", "# The `one` Idea: two\n\n```\n# no heading\n```\n")
    text = """[a](docs/b.md) [b](docs/b.md#the-one-idea-two) [c](https://example.org/none)
![p](docs/none.png) [d](docs/b.md#no-heading) [e](#here)
## Here
```
[f](in-a-fence.md)
```
"""
    errors = check_links.check_file(write(tmp_path, "a.md", text), tmp_path)
    assert [e.split(": ", 1)[1] for e in errors] == [
        "docs/none.png does not exist",
        "docs/b.md#no-heading: no such heading",
    ]


def test_limits_check(tmp_path):
    write(tmp_path, "tests/test_a.py", "def test_x():\n    pass\n")
    write(tmp_path, "tests/a_test.cpp", "TEST(Suite, Name) {\n}\n")
    page = write(
        tmp_path,
        "docs/limits.md",
        """| Limit | Test |
|---|---|
| a | `tests/test_a.py::test_x` |
| b | `tests/a_test.cpp::Suite.Name` |
| c | `tests/test_a.py::test_y` |
| d | `tests/none.py::test_x` |
| e | none |
""",
    )
    errors = check_limits.check(page, tmp_path)
    assert [e.split(": ", 1)[1] for e in errors] == [
        "'c': tests/test_a.py has no test_y",
        "'d': tests/none.py does not exist",
        "'e' names no test",
    ]


def test_total_counts_both_runners(tmp_path, capsys):
    pytest_xml = """<testsuites><testsuite>
      <testcase classname="t" name="a"/><testcase classname="t" name="b"><failure/></testcase>
      <testcase classname="t" name="c"><error/></testcase>
      <testcase classname="t" name="d"><skipped/></testcase></testsuite></testsuites>"""
    ctest_xml = """<testsuite><testcase name="A.x" status="run"/>
      <testcase name="A.y" status="fail"><failure/></testcase>
      <testcase name="A.z" status="notrun"><skipped/></testcase></testsuite>"""
    first, second = run_tests.Result("python"), run_tests.Result("core")
    run_tests.count(first, write(tmp_path, "p.xml", pytest_xml))
    run_tests.count(second, write(tmp_path, "c.xml", ctest_xml))
    assert (first.passed, first.failed, first.skipped) == (1, 2, 1)
    assert (second.passed, second.failed, second.skipped) == (1, 1, 1)
    run_tests.summary([first, second])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "2 passed, 3 failed, 2 skipped"
    assert "  FAILED core: A.y" in lines


def test_a_stage_that_breaks_or_runs_nothing_is_a_failure(capsys):
    broken = run_tests.finish(run_tests.Result("core"), 2, "core: cmake --build")
    empty = run_tests.finish(run_tests.Result("dist"), 0, "dist: pytest")
    lint = run_tests.finish(run_tests.Result("lint"), 0, "lint")
    counted = run_tests.finish(run_tests.Result("python", passed=3, failed=1), 1, "python: pytest")
    run_tests.summary([broken, empty, lint, counted])
    assert capsys.readouterr().out.splitlines()[-1] == "3 passed, 3 failed"


def make(*arguments: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_every_make_command_of_the_documents_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in ("README.md", "CONTRIBUTING.md", "docs/getting-started.md"):
        # Commands stand in backquotes or at the start of a line of a code block.
        text = (ROOT / page).read_text()
        named = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", text, re.M))
        assert named and named <= targets, page
    listed = make("help").stdout
    for target in ("demo", "test", "test-gpu", "lint"):
        assert f"make {target} " in listed


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_demo_without_install_uses_the_given_python():
    shown = make("-n", "demo", "SKIP_INSTALL=1", "PYTHON=some-python", "RANKS=4", "STEPS=7").stdout
    assert "some-python -m torch.distributed.run" in shown
    assert "--nproc-per-node 4" in shown and "--steps 7" in shown
    assert "bootstrap" not in shown


def test_ci_calls_the_test_command_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text()
    assert "make --no-print-directory test NEWEST=1" in script
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "make test" in (ROOT / "README.md").read_text()


def test_bootstrap_names_the_one_command_when_it_may_not_install(tmp_path):
    tools = ["bash", "dirname", "tr", "cat", "sha256sum", "cut", "find", "sort", "xargs", "tail"]
    for name in [*tools, "mkdir", "basename", "head"]:
        os.symlink(shutil.which(name), tmp_path / name)
    for name, line in (("id", "echo 1000"), ("apt-get", "exit 9")):
        fake = write(tmp_path, name, f"#!{shutil.which('bash')}\n{line}\n")
        fake.chmod(0o755)
    done = subprocess.run(
        [ROOT / "tools" / "bootstrap.sh", str(tmp_path / "venv"), "torch"],
        env={"PATH": str(tmp_path), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "sudo sh -c 'apt-get update && apt-get install -y" in done.stderr
    for package in ("g++", "cmake", "ninja-build", "nlohmann-json3-dev", "libgtest-dev"):
        assert package in done.stderr
    assert not (tmp_path / "venv").exists()


def test_every_subcommand_of_the_readme_exists():
    from deepcompile import cli

    for name in set(re.findall(r"^deepcompile ([a-z]+)", (ROOT / "README.md").read_text(), re.M)):
        with pytest.raises(SystemExit) as ended:
            cli.main([name, "--help"])
        assert ended.value.code == 0


def test_configuration_page_is_up_to_date():
    assert config_page.PAGE.read_text(encoding="utf-8") == config_page.page()
    assert "| `zero_optimization.stage` | supported | `0` |" in config_page.page()
