# SPDX-License-Identifier: Apache-2.0
"""Inductor's questions about the CPU are asked once for a cache's folder."""

import pytest
import torch
from torch._inductor import cpu_vec_isa

from deepcompile.capture import vector_checks


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """The codes whose check was really made; they pass unless they are "bad"."""
    made = []

    def check_build(isa, code):
        made.append(code)
        return code != "bad"

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", check_build)
    return made


def check(code):
    with vector_checks.remembered():
        return cpu_vec_isa.VecAVX2().check_build(code)


def test_what_passed_is_not_asked_again(asked):
    assert [check(code) for code in ("a", "a", "b", "a")] == [True] * 4
    assert asked == ["a", "b"]


def test_what_failed_is_asked_again(asked):
    assert not check("bad") and not check("bad")
    assert asked == ["bad", "bad"]


def test_another_torch_compiler_or_cpu_is_asked(asked, monkeypatch):
    check("a")
    monkeypatch.setattr(torch, "__version__", "3.0")
    check("a")
    monkeypatch.setattr(cpu_vec_isa, "x86_isa_checker", lambda: ["another"])
    check("a")
    assert asked == ["a"] * 3


def test_inductor_is_as_it_was_afterwards(asked):
    made = cpu_vec_isa.VecISA.check_build
    check("a")
    assert cpu_vec_isa.VecISA.check_build is made


def test_another_torch_without_such_checks(asked, monkeypatch):
    monkeypatch.delattr(cpu_vec_isa, "x86_isa_checker")
    assert check("a") and check("a")
    assert asked == ["a", "a"]
