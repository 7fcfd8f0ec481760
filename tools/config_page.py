# SPDX-License-Identifier: Apache-2.0
"""Writes docs/config.md from the configuration's dataclasses and tables of keys.

``--check`` writes nothing and fails if the page is not what it would write.
"""

from __future__ import annotations

import ast
import json
import runpy
import sys

from repo_files import ROOT

PACKAGE = ROOT / "python" / "deepcompile"
PAGE = ROOT / "docs" / "config.md"

HEAD = """# Configuration

One JSON file (or a dict) in DeepSpeed's form. A key that is not listed here is an
error that names the nearest known one; nothing is ignored silently. `"auto"` is for trainers
that fill it in before; here it is an error.

<!-- Written by tools/config_page.py from python/deepcompile/config.py and config_keys.py. -->

```json
{
  "train_micro_batch_size_per_gpu": 8,
  "gradient_clipping": 1.0,
  "bf16": {"enabled": true},
  "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "weight_decay": 0.1}},
  "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 5000}},
  "zero_optimization": {"stage": 3}
}
```

Two of `train_batch_size`, `train_micro_batch_size_per_gpu` and
`gradient_accumulation_steps` fix the third for the number of ranks; the first or second alone
means one accumulation step.

*Supported* keys act. *Warned* keys change speed or logging only: they are accepted without
effect, with a warning that says why unless they are switched off. *Refused* keys would change
what is trained or where: they are errors unless switched off.
"""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _default(node: ast.AnnAssign, sections: set[str], name: str) -> str:
    """The default as JSON writes it; empty for a section."""
    if name in sections or not isinstance(node.value, ast.Call):
        return ""
    positional = node.value.args[1:]
    for keyword in node.value.keywords:
        if keyword.arg == "default_factory":
            return "`{}`"
    shown = ast.unparse(positional[0]) if positional else "None"
    if shown == "None":
        return "none"
    value = eval(shown, {"__builtins__": {}})  # a literal or arithmetic on literals, from our file
    return f"`{json.dumps(value)}`"


def fields_of(tree: ast.Module, sections: set[str]) -> dict[str, list[tuple[str, str, str]]]:
    """{class: [(key, default, meaning)]} of the dataclass fields made by _key."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        rows = []
        for at, item in enumerate(node.body):
            is_key = (
                isinstance(item, ast.AnnAssign)
                and isinstance(item.value, ast.Call)
                and getattr(item.value.func, "id", "") == "_key"
            )
            if not is_key:
                continue
            after = node.body[at + 1] if at + 1 < len(node.body) else None
            text = ""
            name = item.target.id
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                text = str(after.value.value)
            rows.append((name, _default(item, sections, name), _cell(text)))
        found[node.name] = rows
    return found


def _sections(tree: ast.Module) -> dict[str, str]:
    """{section: class} as the SECTIONS table says."""
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "SECTIONS":
            keys, values = node.value.keys, node.value.values
            return {key.value: value.id for key, value in zip(keys, values, strict=True)}
    raise SystemExit("config_page: config.py has no SECTIONS table")


def _prefix(section: str) -> str:
    """What stands before a key's name: sections are objects, one inside another."""
    return {"": "", "leaf_module": "zero_optimization.leaf_module."}.get(section, section + ".")


def page() -> str:
    """The whole page."""
    tree = ast.parse((PACKAGE / "config.py").read_text(encoding="utf-8"))
    sections = {"": "Config", **_sections(tree)}
    fields = fields_of(tree, set(sections))
    tables = runpy.run_path(str(PACKAGE / "config_keys.py"))
    lines = [HEAD]
    for section, name in sections.items():
        rows = [
            f"| `{_prefix(section)}{key}` | supported | {default} | {text} |"
            for key, default, text in fields[name]
            if key not in sections
        ]
        for kind, meaning in (("WARNED", str), ("REFUSED", lambda value: value[1])):
            rows += [
                f"| `{_prefix(part)}{key}` | {kind.lower()} | | {_cell(meaning(value))} |"
                for part in (section, f"{section}.params")
                for key, value in tables[kind].get(part, {}).items()
            ]
        lines.append(f"\n## {section or 'Top level'}\n")
        if not rows:
            lines.append("Accepted so that existing files load; nothing in it is needed.")
            continue
        lines += ["| Key | | Default | Meaning |", "|---|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def main() -> int:
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
        print("docs/config.md is out of date: run python3 tools/config_page.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
