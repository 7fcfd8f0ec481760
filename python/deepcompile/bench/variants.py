# SPDX-License-Identifier: Apache-2.0
"""Which variants and settings a framework has, asked before anything starts. No torch."""

from __future__ import annotations

import argparse

from ..cli.arguments import memory_budget
from ..errors import UserError, meant

FSDP = ("prefetch", "copy_engine", "overlap")
OURS = ("budget", "name")
"""``budget=20GiB`` or a fraction, or the peer whose peak it is; ``name=TEXT`` only tells rows
apart."""
PEERS = ("fsdp", "fsdp_c")
"""Whose peak may be a budget."""
WITHOUT_BEST = ("deepcompile", "single", "single_c")


def no_best(framework: str) -> str | None:
    """Why it has no ``best`` settings, in words; None: it has."""
    if framework not in WITHOUT_BEST:
        return None
    return f"{framework} has no best settings, as it has none to turn by hand: leave best out"


def wrong(framework: str, variant: str) -> str | None:
    """What is wrong with a variant, in words; None: nothing."""
    if not variant:
        return None
    if framework == "deepcompile":
        found = map(_wrong_word, variant.split(","))
        return next((said for said in found if said), None)
    if not framework.startswith("fsdp"):
        return f"{framework} has no variant {variant!r}: leave it out"
    if variant not in FSDP:
        near = meant(variant, FSDP)
        return f"FSDP has no variant {variant!r}{near or ':'} use one of {', '.join(FSDP)}, or none"
    if variant == "overlap" and framework != "fsdp_c":
        return "overlap is made by compiling: use fsdp_c"
    return None


def _wrong_word(word: str) -> str | None:
    key, _, value = word.partition("=")
    if key not in OURS:
        near = meant(key, OURS) or ":"
        return (
            f"deepcompile has no variant {word!r}{near} use budget=SIZE, or name=TEXT, which only "
            "tells rows apart"
        )
    if not value:
        return f"{key}= has no value: write {'budget=20GiB' if key == 'budget' else 'name=TEXT'}"
    if key == "name" or value in PEERS:
        return None
    try:
        memory_budget(value)
    except argparse.ArgumentTypeError as error:
        near = meant(value, PEERS) or ":"
        return f"{word}{near} {error}, or as {' or '.join(PEERS)}, whose peak it then is"
    return None


def check(framework: str, settings: str, variant: str, written: str = "") -> None:
    """Raises UserError for what the framework does not have; `written`: all of it, as given."""
    if settings == "best" and (reason := no_best(framework)):
        raise UserError(f"[bench] {written or 'settings best'}: {reason}.")
    if reason := wrong(framework, variant):
        raise UserError(f"[bench] {written or f'variant {variant}'}: {reason}.")
