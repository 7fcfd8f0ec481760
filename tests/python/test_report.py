# SPDX-License-Identifier: Apache-2.0
"""The report page: one file, nothing from outside, every part shown or left out."""

from __future__ import annotations

import html.parser
import json
import math
import re

import pytest

from deepcompile.report import write_report
from deepcompile.report.units import format_bytes, format_nanos, format_seconds

MIB = 1 << 20
TAGS_WITHOUT_END = {"meta", "link", "br", "hr", "img", "input", "rect", "line", "circle", "path"}


def make_step(scale: float, layers: int = 4) -> list[dict]:
    """A ZeRO-3 step of ``layers`` layers, gather overlapping compute; times grow by ``scale``."""
    items: list[dict] = []
    clock = {"compute": 0.0, "link": 0.0, "to_host": 0.0, "wait": 0.0}
    count: dict[str, int] = {}

    def put(section: str, resource: str, label: str, nanos: float, after: str = "") -> None:
        start = max(clock[resource], clock[after] if after else 0.0)
        clock[resource] = start + nanos * scale
        count[section] = count.get(section, -1) + 1
        items.append(
            {
                "section": section,
                "index": count[section],
                "label": label,
                "resource": resource,
                "start_ns": int(start),
                "end_ns": int(clock[resource]),
            }
        )

    for layer in range(layers):
        put("forward 0", "link", f"gather L{layer}", 1.4e6)
        put("forward 0", "compute", f"run fwd.{layer}", 2.6e6, "link")
    for layer in reversed(range(layers)):
        put(
            "backward 0",
            "link",
            f"gather L{layer}",
            1.4e6,
            "compute" if layer == layers - 1 else "",
        )
        put("backward 0", "wait", f"wait L{layer}", 0.3e6, "compute")
        put("backward 0", "compute", f"run bwd.{layer}", 5.1e6, "link")
        put("backward 0", "link", f"reduce L{layer}", 1.9e6, "compute")
    for layer in range(layers):
        put("update", "compute", f"update L{layer}", 0.7e6, "link")
        put("update", "to_host", f"offload L{layer}", 0.4e6, "compute")
    return items


def make_curves() -> dict:
    """Training and validation loss of 180 steps."""
    loss = [
        {
            "step": step,
            "loss": 2.2 + 3.3 * math.exp(-step / 45) + 0.06 * math.sin(step * 1.7),
            "tokens_per_s": 5200 + 300 * math.sin(step),
        }
        for step in range(1, 181)
    ]
    held = [{"step": s, "loss": 2.4 + 3.1 * math.exp(-s / 45)} for s in (1, 60, 120, 180)]
    return {"loss": loss, "validation": held}


def make_data() -> dict:
    predicted, measured = make_step(1.0), make_step(1.27)
    end = max(item["end_ns"] for item in predicted)
    shape = [0.3, 0.5, 0.7, 0.86, 0.97, 1.0, 0.9, 0.72, 0.55, 0.4, 0.33, 0.3]
    memory = [[int(end * i / len(shape)), int(180 * MIB * h)] for i, h in enumerate(shape)]
    slower = [[int(t * 1.27), int(b * 1.06)] for t, b in memory]
    return {
        "title": "Llama, 4 layers, 2 ranks",
        "facts": {
            "Model": "LlamaForCausalLM, 3.4 M parameters",
            "World": "2 ranks, gloo",
            "Commit": "0123abcd",
            "Versions": "torch 2.11.0, Python 3.12",
            "Machine": "2 x CPU",
        },
        **make_curves(),
        "timeline": {"predicted": predicted, "measured": measured},
        "memory": {"predicted": memory, "measured": slower},
        "compare": [
            {
                "what": "Step time",
                "predicted": 52e6,
                "measured": 63e6,
                "unit": "ns",
                "headline": True,
            },
            {"what": "Peak memory", "predicted": 180 * MIB, "measured": 191 * MIB, "unit": "B"},
            {"what": "Collectives", "predicted": 12, "measured": None, "unit": ""},
        ],
        "compile": {
            "stages": {"Dynamo": 3.1, "AOTAutograd": 5.4, "cut": 0.4, "regions": 21.7},
            "regions": {"Distinct regions": 9, "Region calls": 15, "From disk": 0},
        },
        "reasons": [
            {
                "pass": "zero3_compile",
                "object": "L0.q",
                "text": "kept sharded: 3 MiB a rank instead of 6",
            },
            {
                "pass": "zero3_compile",
                "object": "",
                "text": "two reductions outstanding: <double> buffer",
            },
        ],
        "plan": "step llama world=2\nforward 0 (ids) -> (loss)\n  gather L0\nend\n",
        "samples": [
            {"when": "Before training", "text": "\x7f</script>zz"},
            {"when": "After", "text": "def"},
        ],
        "notes": ["Shortened run: 180 steps."],
    }


class Balance(html.parser.HTMLParser):
    """Fails on a closing tag that does not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in TAGS_WITHOUT_END:
            self.open.append(tag)
        self.outside += [v for k, v in attrs if k in ("src", "href") and v]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_is_one_file_with_every_part(tmp_path):
    path = write_report(make_data(), tmp_path / "out" / "report.html")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    text = path.read_text(encoding="utf-8")
    for heading in (
        "Loss",
        "One step",
        "Memory over the step",
        "Predicted and measured",
        "Compile time",
        "Why it is so",
        "What the model writes",
        "The plan",
    ):
        assert f"<h2>{heading}</h2>" in text
    parser = Balance()
    parser.feed(text)
    assert parser.open == []
    assert parser.outside == []
    assert not re.findall(r"url\((?!#)|@import|https?://(?!www\.w3\.org/2000/svg)", text)


def test_embedded_data_survives_hostile_text(tmp_path):
    data = make_data()
    data["timeline"]["predicted"][0]["label"] = "</script><script>alert(1)</script>"
    text = write_report(data, tmp_path / "r.html").read_text(encoding="utf-8")
    assert "alert(1)</script>" not in text
    assert "&lt;double&gt;" in text
    embedded = re.search(r'id="charts">(.*?)</script>', text, re.S).group(1)
    charts = json.loads(embedded)
    assert charts["timeline"]["predicted"][0]["label"].startswith("</script>")
    assert len(charts["loss"]) == 180


def test_measured_time_starts_at_zero_and_empty_items_are_dropped(tmp_path):
    item = {"section": "forward 0", "label": "run a", "resource": "compute"}
    data = {
        "title": "t",
        "timeline": {
            "measured": [
                item | {"index": 0, "start_ns": 5_000, "end_ns": 7_000},
                item | {"index": 1, "start_ns": 7_000, "end_ns": 7_000},
            ]
        },
    }
    text = write_report(data, tmp_path / "r.html").read_text(encoding="utf-8")
    charts = json.loads(re.search(r'id="charts">(.*?)</script>', text, re.S).group(1))
    assert [(i["start_ns"], i["end_ns"]) for i in charts["timeline"]["measured"]] == [(0, 2_000)]


def test_parts_without_data_are_left_out(tmp_path):
    text = write_report({"title": "A plan"}, tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<h1>A plan</h1>" in text
    assert "<h2>" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"title": ""}, "title is missing"),
        ({"tilte": "x"}, r"unknown keys \['tilte'\]"),
        (
            {
                "timeline": {
                    "predicted": [
                        {
                            "section": "update",
                            "index": 0,
                            "label": "update L0",
                            "resource": "disk",
                            "start_ns": 0,
                            "end_ns": 1,
                        }
                    ]
                }
            },
            "'update L0' uses resource 'disk'",
        ),
        ({"compare": [{"what": "Step time", "unit": "hours"}]}, "'Step time' has unit 'hours'"),
    ],
)
def test_wrong_data_is_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write_report(make_data() | change, tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []


def test_units():
    assert [format_nanos(n) for n in (999, 1_500, 2_000_000, 3.2e9, None)] == [
        "999 ns",
        "1.5 µs",
        "2 ms",
        "3.2 s",
        "–",
    ]
    assert [format_bytes(n) for n in (10, 1536, 3 * MIB, 5 << 30)] == [
        "10 B",
        "1.5 KiB",
        "3 MiB",
        "5 GiB",
    ]
    assert [format_seconds(s) for s in (0.05, 12.34)] == ["50.0 ms", "12.3 s"]
