# SPDX-License-Identifier: Apache-2.0
"""deepcompile: a compiler and runtime for sharded PyTorch training.

engine, optimizer, loader, scheduler = deepcompile.initialize(model=model, config="ds.json")
engine.compile()
for batch in data:
    loss = engine(**batch).loss
    engine.backward(loss)
    engine.step()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import InternalError, UserError

if TYPE_CHECKING:
    from .api import GatheredParameters, initialize
    from .config import Config, ConfigWarning, load_config
    from .engine import Engine

__version__ = "0.1.0"
__all__ = [
    "Config",
    "ConfigWarning",
    "Engine",
    "GatheredParameters",
    "InternalError",
    "UserError",
    "cmake_dir",
    "initialize",
    "load_config",
]

_HOMES = {
    "Config": "config",
    "ConfigWarning": "config",
    "load_config": "config",
    "Engine": "engine",
    "GatheredParameters": "api",
    "initialize": "api",
}
_MODULES = ("data", "models", "passes")


def cmake_dir() -> str:
    """The folder of the CMake package for passes in C++: give it as CMAKE_PREFIX_PATH."""
    from pathlib import Path

    folder = Path(__file__).parent / "sdk" / "cmake"
    if not folder.is_dir():
        raise UserError(
            f"[passes] {folder}: is missing: this deepcompile was not installed by its build. "
            "Run `cmake --install` or pip install it."
        )
    return str(folder)


def __getattr__(name: str) -> Any:
    # Imported on first use: the command line plans without starting torch.
    from importlib import import_module

    if name in _HOMES:
        if _HOMES[name] != "config":
            import_module(".built_for", __name__)
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    from .foreign import of_package

    raise of_package(name)
