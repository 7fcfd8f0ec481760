# SPDX-License-Identifier: Apache-2.0
"""The forms that an engine switches Hugging Face models to: the same results as the models' own."""

import copy

import pytest
import torch
from reference_runner import Sequential
from test_engine import config, error_of, start
from torch import nn

from deepcompile.capture import CaptureBackend
from deepcompile.capture.attention import NAME, needs_mask, why_not
from deepcompile.config import CompileConfig
from deepcompile.fast_forms import FastForms, choose_experts

transformers = pytest.importorskip("transformers")

TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "use_cache": False,
}  # fmt: skip


def build(kind: str, **keys) -> nn.Module:
    torch.manual_seed(0)
    made = transformers.AutoConfig.for_model(kind, **{**TINY, **keys})
    return transformers.AutoModelForCausalLM.from_config(made).train()


def masking_itself(model: nn.Module) -> nn.Module:
    """A model that makes a mask where it is given none."""
    plain = model.forward

    def forward(input_ids, attention_mask=None, **more):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return plain(input_ids=input_ids, attention_mask=mask, **more)

    model.forward = forward
    return model


def with_second_name(model: nn.Module) -> nn.Module:
    """A model that has one of its modules twice, as those of PEFT's prompt tuning have."""
    model.word_embeddings = model.model.embed_tokens
    return model


def engine_for(model, bf16=False, **settings):
    engine = start(model, config=config(compile=settings, bf16={"enabled": bf16}))
    engine.compile(backend="eager")
    return engine


def ids(rows=2, length=12, seed=0):
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def labelled(length=12, **more):
    return {"input_ids": ids(length=length), "labels": ids(length=length), **more}


@pytest.fixture
def captured(monkeypatch):
    """Per captured graph, whether its attention is causal without a mask."""
    torch._dynamo.reset()  # which sizes vary it remembers from other tests
    found, capture = [], CaptureBackend.__call__

    def recording(backend, graph, inputs):
        calls = [n for n in graph.graph.nodes if "scaled_dot_product" in str(n.target)]
        forms = {n.kwargs["is_causal"] and n.kwargs["attn_mask"] is None for n in calls}
        grouped = {n.kwargs.get("enable_gqa", False) for n in calls}
        assert len(forms) == 1 and grouped == forms, "grouped heads go with causal attention"
        found.append(forms.pop())
        return capture(backend, graph, inputs)

    monkeypatch.setattr(CaptureBackend, "__call__", recording)
    return found


LEFT, RIGHT = torch.ones(2, 12, dtype=torch.int64), torch.ones(2, 12, dtype=torch.int64)
LEFT[0, :3] = 0
RIGHT[1, 8:] = 0
PACKED = torch.cat([torch.arange(5), torch.arange(7)]).expand(2, -1)


def test_each_batch_attends_as_plain_hugging_face_would(captured):
    model = build("llama")
    reference, shared = copy.deepcopy(model), model.config
    engine = engine_for(model)
    other = engine_for(type(model)(shared), causal_attention="off")  # the same config object
    for more in ({}, {"attention_mask": LEFT}, {"attention_mask": RIGHT}, {"position_ids": PACKED}):
        batch = labelled(**more)
        out, wanted = engine(**batch), reference(**batch)
        torch.testing.assert_close(out.loss, wanted.loss)
        rows = slice(None) if "attention_mask" not in batch else batch["attention_mask"].bool()
        torch.testing.assert_close(out.logits[rows], wanted.logits[rows])
    other(**labelled())
    engine(**labelled())
    assert captured == [True, False, False, False], "both paddings share a graph"
    assert shared._attn_implementation == "sdpa", "the model itself stays as it was"
    report = engine.compile_report()["fast_forms"]["causal_attention"]
    assert report["used"] and report["with_own_mask"] == {"attention_mask": 2, "position_ids": 1}
    assert not other.compile_report()["fast_forms"]["causal_attention"]["used"]
    engine.backward(engine(**labelled()).loss)
    engine.step()
    reference(**labelled()).loss.backward()
    torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.1).step()
    trained = engine.state_dict()
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(trained[name], value, atol=1e-5, rtol=1e-4)


def test_a_window_is_the_models_own_where_the_sequence_is_longer(captured):
    model = build("mistral", sliding_window=9)
    reference, engine = copy.deepcopy(model), engine_for(model)
    for length in (6, 7, 12):  # 7 makes the length symbolic, with the window as its bound
        out = engine(**labelled(length))
        torch.testing.assert_close(out.loss, reference(**labelled(length)).loss)
    assert captured[-1] is False and all(captured[:-1])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Sequential, "no Hugging Face model"),
        (lambda: build("llama", attn_implementation="eager"), "attention is eager, not sdpa"),
        (lambda: build("bert", is_decoder=False), "masks that are more than causal"),
        (lambda: build("falcon"), "treats sdpa apart"),
        (lambda: masking_itself(build("llama")), "padding mask by itself"),
        (
            lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(
                vocab_size=64, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)),
            "an encoder and a decoder",
        ),
        (
            lambda: transformers.ViTForImageClassification(transformers.ViTConfig(
                hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)),
            "a trial run on 8 tokens failed",
        ),
        (lambda: build("gpt2", n_embd=32, n_layer=1, n_head=4), None),
        (lambda: build("qwen3", head_dim=8), None),
        (lambda: with_second_name(build("llama", tie_word_embeddings=True)), None),
    ],
)  # fmt: skip
def test_models_that_cannot_are_left_alone_and_named(make, reason):
    model = make()
    state, parameters = torch.random.get_rng_state(), list(model.parameters())
    found = why_not(model, torch.device("cpu"))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert found is None if reason is None else reason in found
    assert torch.equal(torch.random.get_rng_state(), state)
    if hasattr(model, "config"):
        assert NAME not in str(model.config._attn_implementation)


def test_arguments_that_may_need_a_mask_are_named():
    assert needs_mask({"input_ids": ids(), "labels": ids(), "attention_mask": None}) is None
    assert needs_mask({"input_ids": ids(), "use_cache": False, "logits_to_keep": 1}) is None
    for name, value in (("token_type_ids", ids()), ("is_causal", False), ("use_cache", ids())):
        assert needs_mask({"input_ids": ids(), name: value}) == name


def test_on_is_an_error_where_a_mask_would_be_made():
    settings = {"compile": {"causal_attention": "on"}}
    message = error_of(lambda: start(Sequential(), config=config(**settings)))
    assert "causal_attention 'on': Sequential keeps its own attention: it is no Hugging" in message
    engine = engine_for(build("llama"), causal_attention="on")
    message = error_of(lambda: engine(ids(), torch.ones_like(ids())))  # a mask by position
    assert "attention_mask was given" in message and "without_full_masks" in message


def mixtral(**keys):
    return build("mixtral", num_local_experts=4, num_experts_per_tok=2, **keys)


def test_experts_are_chosen_by_type_and_shape():
    assert choose_experts(mixtral(), "auto")[0] == "batched_mm"
    assert choose_experts(mixtral().bfloat16(), "auto")[0] == "grouped_mm"
    chosen, why = choose_experts(mixtral(intermediate_size=20).bfloat16(), "auto")
    assert chosen == "batched_mm" and "no multiple of 16 bytes" in why
    given = mixtral(experts_implementation="batched_mm").bfloat16()
    assert choose_experts(given, "auto") == (None, "the model was given batched_mm")
    assert choose_experts(given, "grouped_mm")[0] == "grouped_mm"
    assert choose_experts(mixtral(experts_implementation="eager"), "auto")[0] == "batched_mm"
    assert choose_experts(mixtral(), "model")[0] is None
    assert choose_experts(build("llama"), "auto")[0] is None
    assert "float32" in error_of(lambda: choose_experts(mixtral(), "grouped_mm"))
    assert "no experts" in error_of(lambda: choose_experts(build("llama"), "batched_mm"))


def test_what_is_set_later_stays_and_an_error_undoes_the_forms():
    model = mixtral()
    forms = FastForms(model, CompileConfig(), torch.device("cpu"))
    with pytest.raises(RuntimeError), forms.applied((), labelled()):
        assert model.config._attn_implementation == NAME
        assert model.config._experts_implementation == "batched_mm"
        raise RuntimeError
    assert model.config._attn_implementation == "sdpa"
    assert model.config._experts_implementation == "grouped_mm"
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    with forms.applied((), labelled()):
        assert model.config._attn_implementation == model.config._experts_implementation == "eager"


def reduced_at_once(engine) -> int:
    """How many experts' gradients are reduced, each before the next region runs."""
    program = engine.planner.graphs[0].program
    outputs = {region.name: region.outputs for region in program.regions}
    makes = {v.name: v.grad_of for v in program.values if v.grad_of and "experts" in v.grad_of}
    count, due = 0, set()
    for instr in program.sections[1].instrs:
        if instr.op == "run":
            assert not due, "an expert's gradient waits while another region runs"
            due = {makes[value] for value in outputs[instr.region] if value in makes}
        elif instr.op == "reduce" and instr.operand in due:
            due.remove(instr.operand)
            count += 1
    return count


def test_bf16_experts_are_grouped_in_one_graph_and_reduced_as_they_appear():
    model = mixtral()
    reference = copy.deepcopy(model).bfloat16()
    engine = engine_for(model, bf16=True, region_bytes=10_000)
    loss = engine(**labelled()).loss
    torch.testing.assert_close(loss, reference(**labelled()).loss, atol=2e-3, rtol=0)
    engine.backward(loss)
    engine.step()
    report = engine.compile_report()
    assert report["graphs"] == 1 and not report["graph_breaks"]
    assert report["fast_forms"]["experts"]["implementation"] == "grouped_mm"
    assert reduced_at_once(engine) == 2


def test_loss_only_returns_the_loss_in_training_and_all_in_evaluation(captured):
    model = mixtral(use_cache=True)  # in fp32: transformers' default would be no whole graph
    reference, engine = copy.deepcopy(model), engine_for(model, loss_only=True)
    out = engine(**labelled())
    torch.testing.assert_close(out.loss, reference(**labelled()).loss)
    assert engine.compile_report()["fast_forms"]["experts"]["implementation"] == "batched_mm"
    assert model.config._experts_implementation == "grouped_mm", "the model itself stays as it was"
    assert len(engine.planner.graphs[0].program.sections[0].outputs) == 1
    assert out.loss is out["loss"] and out[0] is out.loss and list(out) == ["loss"]
    assert out.loss.requires_grad and not hasattr(out, "__deepcopy__")
    for read in (lambda: out.logits, lambda: out["logits"], lambda: out[1],
                 lambda: out.get("logits")):  # fmt: skip
        assert "compile.loss_only is true: set it to false" in error_of(read)
    engine.backward(out.loss)
    engine.eval(), reference.eval()
    with torch.no_grad():
        torch.testing.assert_close(engine(**labelled()).logits, reference(**labelled()).logits)
    assert captured == [True, True], "a fresh cache is no reason for a mask"


def test_loss_only_without_compilation_and_without_labels():
    engine = start(build("llama"), config=config(compile={"loss_only": True}))
    assert "loss_only" in error_of(lambda: engine(**labelled()).logits)
    assert engine(input_ids=ids()).logits is not None, "without labels there is no loss to keep"
