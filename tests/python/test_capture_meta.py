# SPDX-License-Identifier: Apache-2.0
"""Captures without weights, and the built-in model configurations."""

import json
import re

import pytest
import torch

from deepcompile.capture import meta
from deepcompile.capture.layers import layers_alike
from deepcompile.capture.meta import capture_model, capture_repeated
from deepcompile.errors import UserError
from deepcompile.models import build, load_config, names

PARAMETERS = {  # published sizes
    "gpt2": 124_439_808,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "mixtral-8x7b": 46_702_792_704,
}


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_built_in_sizes(name):
    with torch.device("meta"):
        model = build(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_every_built_in_config_loads():
    assert {*PARAMETERS, "llama-tiny"} <= set(names())
    for name in names():
        assert load_config(name).vocab_size > 0


def test_tiny_llama():
    graphs, table = capture_model(
        "llama-tiny", batch=2, seq=64, stage=3, world=4, persistence_threshold=1000
    )
    (graph,) = graphs
    assert not graph.inference and graph.codes[0] is not None
    program = graph.program
    program.verify()
    assert program.world == 4
    assert {p.placement for p in table.params} == {"sharded", "whole"}
    assert all(p.dtype is torch.bfloat16 for p in table.params)
    # 2 FLOPs a weight and token forward, 4 backward, attention on top.
    weights = sum(p.numel for p in table.params if not p.packed and "embed" not in p.name)
    flops = sum(r.flops for r in graph.ir.regions)
    assert 6 * weights * 128 < flops < 7 * weights * 128


def test_checkpointing_saves_less_and_computes_more():
    def step(checkpointing):
        (graph,), _ = capture_model(
            "llama-tiny", batch=2, seq=64, persistence_threshold=1000, checkpointing=checkpointing
        )
        ir = graph.ir
        forward, backward = ir.sections
        read = {x for r in backward.regions for x in ir.region(r).inputs if isinstance(x, str)}
        made = {v for r in forward.regions for v in ir.region(r).outputs}
        saved = sum(v.nbytes for v in ir.values if v.name in read & made)
        return saved, sum(r.flops for r in ir.regions)

    plain, less = step(False), step(True)
    assert less[0] < plain[0] / 2
    assert less[1] > plain[1] * 1.1


def test_depth_and_precision_can_be_chosen():
    graphs, table = capture_model(
        "llama-tiny", batch=1, seq=16, dtype="fp32", stage=0, num_layers=1
    )
    assert {p.placement for p in table.params} == {"replicated"}
    assert not any("layers.1." in m.name for p in table.params for m in p.members)
    assert table.params[0].dtype is torch.float32


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 0}, "batch 0"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"seq": 5000}, "context is 1024 tokens"),
        ({"num_layers": 0}, "num_layers 0"),
        ({"stage": 4}, "stage 4"),
        ({"config": "llama-9"}, "neither a file nor a built-in model"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(UserError) as error:
        capture_model(**{"config": "llama-tiny", "batch": 1, "seq": 8, **options})
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "has no model_type"),
        ("{}", "has no model_type"),
        (json.dumps({"model_type": "nonsense"}), "model_type 'nonsense'"),
        (json.dumps({"model_type": "clip"}), "no causal language model"),
    ],
)
def test_bad_config_files(tmp_path, text, words):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"\[models\]") as error:
        build(str(path))
    assert words in str(error.value)


def test_config_of_a_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 99}))
    assert load_config(tmp_path).vocab_size == 99


def text_of(graph) -> str:
    """The program with its values numbered: their names are the trace's, and mean nothing."""
    numbers = {v.name: f"v{i}" for i, v in enumerate(graph.program.values)}
    word = re.compile(r"[A-Za-z_][A-Za-z0-9_.:/-]*")
    return word.sub(lambda m: numbers.get(m.group(), m.group()), str(graph.program))


def small(kind: str, **fields):
    """A model of 64 wide layers whose parameters are as large as the threshold below wants."""
    import transformers

    common = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
    }
    return getattr(transformers, f"{kind}Config")(**common, **fields)


@pytest.mark.parametrize(
    ("config", "depth", "options"),
    [
        (small("Llama"), 5, {}),
        (small("Llama"), 9, {"seq": 48, "batch": 2, "stage": 1}),
        (small("Llama", tie_word_embeddings=True), 6, {"dtype": "fp32", "stage": 0}),
        (small("Llama"), 7, {"checkpointing": True}),
        (small("Mixtral", num_local_experts=4), 5, {}),
        (small("Mixtral", num_local_experts=4), 8, {"stage": 2}),
        (small("Qwen3", head_dim=16), 6, {}),
        (small("Qwen2"), 6, {}),
        (small("Mistral"), 6, {}),
    ],
    ids=lambda x: type(x).__name__ if hasattr(x, "to_dict") else str(x),
)
def test_repeated_layers_are_what_a_capture_of_all_gives(config, depth, options, monkeypatch):
    """Structure, sizes, params, gradients and costs; only the values' names differ."""
    options = {"batch": 1, "seq": 32, "world": 4, "persistence_threshold": 1000, **options}
    all_layers, table = capture_model(config, num_layers=depth, **options)
    captured = []
    real = meta.capture_model

    def counting(*args, num_layers=None, **kwargs):
        captured.append(num_layers)
        return real(*args, num_layers=num_layers, **kwargs)

    monkeypatch.setattr(meta, "capture_model", counting)
    repeated, same_table = capture_repeated(config, num_layers=depth, **options)
    assert captured == [meta.FEW_LAYERS]
    assert same_table.params == table.params
    assert text_of(repeated[0]) == text_of(all_layers[0])
    repeated[0].program.verify()


def test_layers_that_differ_are_all_captured(caplog):
    config = small("Llama")
    config.num_hidden_layers = 6
    options = {"batch": 1, "seq": 16, "persistence_threshold": 1000}
    with torch.device("meta"):
        model = build(config)
    assert layers_alike(model.model.layers)
    model.model.layers[4].self_attn.attention_dropout = 0.5
    assert not layers_alike(model.model.layers)
    # Dropout draws a seed a layer in front: no rule says what a layer in between reads.
    with caplog.at_level("INFO", "deepcompile"):
        graphs, _ = capture_repeated("gpt2", num_layers=5, **options)
    assert "all 5 layers are captured" in caplog.text
    whole, _ = capture_model("gpt2", num_layers=5, **options)
    assert text_of(graphs[0]) == text_of(whole[0])


def test_the_depth_of_a_large_model_costs_little():
    graphs, table = capture_repeated("llama-3-70b", batch=1, seq=512, world=32)
    assert sum(m.numel for p in table.params for m in p.members) == PARAMETERS["llama-3-70b"]
    assert len(graphs[0].program.regions) > 160
    made = {v.grad_of for v in graphs[0].program.values if v.grad_of}
    assert len(made) == sum(len(p.members) for p in table.params)
