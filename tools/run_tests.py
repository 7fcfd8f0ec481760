# SPDX-License-Identifier: Apache-2.0
"""Runs the tests stage by stage and ends with one line, ``N passed, N failed, N skipped``.

The counts are those that the runners report (pytest and ctest, as JUnit XML). A
stage that ends badly without saying which test failed (a build, lint, a crash)
adds one failure, so that the line never hides it. A failing stage does not stop
the later ones, unless they need what it builds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "build" / "test-results"
STAGES = ("lint", "core", "sanitize", "python", "dist")
JOBS = str(os.cpu_count() or 2)
SIDE_BY_SIDE = ("-n", str(min(4, int(JOBS))), "--dist", "worksteal")
"""More at once than processors would only wait for each other, and ranks are processes too."""
GPU_TESTS = ("-n", str(max(2, min(16, int(JOBS) // 4))))
"""Each waits for ranks to start and compile most of its time."""


@dataclass
class Result:
    """What one stage came to."""

    name: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


def run(command: list[str], env: dict[str, str] | None = None) -> int:
    """Run in the repository's root with the output shown."""
    print("$", " ".join(command), flush=True)
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **(env or {})}).returncode


def count(result: Result, xml: Path) -> None:
    """Add a JUnit file's counts to the result."""
    if not xml.is_file():
        return
    for suite in ElementTree.parse(xml).getroot().iter("testsuite"):
        for case in suite.findall("testcase"):
            name = case.get("name", "")
            if case.get("classname") not in (None, "", name):  # ctest repeats the name
                name = f"{case.get('classname')}.{name}"
            bad = case.find("failure") is not None or case.find("error") is not None
            if bad or case.get("status") == "fail":
                result.failed += 1
                result.failures.append(name)
            elif case.find("skipped") is not None or case.get("status") in ("notrun", "disabled"):
                result.skipped += 1
            else:
                result.passed += 1


def finish(result: Result, code: int, what: str) -> Result:
    """A bad exit nobody explained is a failure too."""
    if code != 0 and result.failed == 0:
        result.failed = 1
        result.failures.append(f"{what} ended with exit code {code}")
    if code == 0 and result.passed + result.failed + result.skipped == 0 and what != "lint":
        result.failed = 1
        result.failures.append(f"{what} ran no test")
    return result


def lint() -> Result:
    return finish(Result("lint"), run([sys.executable, "tools/lint.py"]), "lint")


def ctest(name: str, sanitize: str) -> Result:
    """Build the core's tests in their own folder, without torch, and run them."""
    result = Result(name)
    build = ROOT / "build" / name
    configure = ["cmake", "-S", ".", "-B", str(build), "-G", "Ninja"]
    configure += ["-DDEEPCOMPILE_BUILD_PYTHON=OFF", "-DDEEPCOMPILE_BUILD_TESTS=ON"]
    configure += ["-DDEEPCOMPILE_WERROR=ON", f"-DDEEPCOMPILE_SANITIZE={sanitize}"]
    # Beside sanitizers more optimisation costs more to compile than it saves: with -O1 twice
    # as much as with -Og.
    configure += [f"-DCMAKE_BUILD_TYPE={'None' if sanitize else 'Release'}"]
    configure += [f"-DCMAKE_CXX_FLAGS={'-Og -g1' if sanitize else ''}"]
    if shutil.which("ccache"):
        configure += ["-DCMAKE_CXX_COMPILER_LAUNCHER=ccache"]
        if shutil.which("g++"):  # the name that the extension's build takes: it is hashed too
            configure += ["-DCMAKE_CXX_COMPILER=g++"]
    # ccache takes no file with precompiled headers otherwise, and finds what another build folder
    # compiled only if paths are hashed as seen from there.
    cache = {"CCACHE_SLOPPINESS": "pch_defines,time_macros", "CCACHE_BASEDIR": str(ROOT)}
    for step in (configure, ["cmake", "--build", str(build), "-j", JOBS]):
        code = run(step, cache)
        if code != 0:
            return finish(result, code, f"{name}: {' '.join(step[:2])}")
    xml = RESULTS / f"{name}.xml"
    command = ["ctest", "--test-dir", str(build), "-j", JOBS, "--output-on-failure"]
    code = run([*command, "--output-junit", str(xml)])
    count(result, xml)
    return finish(result, code, f"{name}: ctest")


def pytest(name: str, *arguments: str, python: str = sys.executable, **env: str) -> Result:
    result = Result(name)
    xml = RESULTS / f"{name}.xml"
    base = [python, "-m", "pytest", "-q", "--durations=10", "-p", "no:cacheprovider"]
    code = run([*base, f"--junitxml={xml}", *arguments], env)
    count(result, xml)
    return finish(result, code, f"{name}: pytest")


VENV_NEWEST = os.environ.get("VENV_NEWEST", ".venv-newest")


def download_newest() -> subprocess.Popen:
    """Begin to install the newest torch, which mostly waits for the network. `newest` goes on with
    what there is then, and says what is wrong."""
    command = ["nice", "tools/bootstrap.sh", VENV_NEWEST, "torch", "packages"]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=ROOT, stdout=quiet, stderr=quiet)


def newest() -> Result:
    """The end-to-end tests on the newest torch that PyPI has."""
    code = run(["tools/bootstrap.sh", VENV_NEWEST, "torch"], {"QUICK": "1"})
    if code != 0:
        return finish(Result("newest"), code, "newest: bootstrap")
    return pytest(
        "newest", *SIDE_BY_SIDE, "-m", "e2e", "tests/dist", python=f"{VENV_NEWEST}/bin/python"
    )


RUNNERS = {
    "lint": lint,
    "core": lambda: ctest("core", ""),
    "sanitize": lambda: ctest("sanitize", "address,undefined,float-cast-overflow"),
    "python": lambda: pytest("python", *SIDE_BY_SIDE, "tests/python"),
    "dist": lambda: pytest("dist", *SIDE_BY_SIDE, "tests/dist"),
    # All but those that time steps or fill the devices run several at once.
    "gpu": lambda: pytest("gpu", *GPU_TESTS, "-rP", "-m", "not alone", "tests/gpu"),
    "gpu-alone": lambda: pytest("gpu-alone", "-rP", "-m", "alone", "tests/gpu"),
    "newest": newest,
}


def summary(results: list[Result]) -> None:
    """A table, the failed tests by name, and the line that ends it all."""
    print("\n  stage        passed  failed  skipped  seconds")
    for r in results:
        print(f"  {r.name:<12} {r.passed:6}  {r.failed:6}  {r.skipped:7}  {r.seconds:7.0f}")
    for r in results:
        for failure in r.failures:
            print(f"  FAILED {r.name}: {failure}")
    passed, failed, skipped = (
        sum(getattr(r, what) for r in results) for what in ("passed", "failed", "skipped")
    )
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=sorted(RUNNERS), action="append", help="these stages")
    parser.add_argument("--newest", action="store_true", help="end-to-end on the newest torch too")
    options = parser.parse_args()
    names = options.only or [*STAGES, *(["newest"] if options.newest else [])]
    shutil.rmtree(RESULTS, ignore_errors=True)
    RESULTS.mkdir(parents=True)
    results = []
    ahead = download_newest() if "newest" in names[1:] else None
    for name in names:
        if name == "newest" and ahead:
            ahead.wait()
        print(f"\n== {name} ==", flush=True)
        start = time.monotonic()
        result = RUNNERS[name]()
        result.seconds = time.monotonic() - start
        results.append(result)
    summary(results)
    return 1 if any(r.failed for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
