# SPDX-License-Identifier: Apache-2.0
"""initialize() and the engine in one process: API, errors, optimizer, report."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
from torch import nn

import deepcompile
from deepcompile import UserError

LR = 1e-2


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.LayerNorm(32), nn.Linear(32, 4))


def seeded(kind, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return kind()


def config(**extra) -> dict:
    return {
        "train_batch_size": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": 0.1}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100},
        **extra,
    }


def batch(step: int = 0) -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(step))


def start(model=None, **kwargs):
    kwargs = {"config": config()} | kwargs
    return deepcompile.initialize(model=model or small(), **kwargs)[0]


def step(engine, number: int = 0) -> float:
    loss = engine(batch(number)).pow(2).mean()
    engine.backward(loss)
    engine.step()
    return loss.item()


def error_of(work) -> str:
    with pytest.raises(UserError) as caught:
        work()
    return str(caught.value)


# ---- initialize


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"model": "x", "config": config()}, "must be a torch.nn.Module, not str"),
        ({"model": nn.Linear(1, 1)}, "give a JSON file's path or a dict"),
        ({"model": nn.Linear(1, 1), "config": "/none.json"}, "no such file"),
        ({"model": nn.ReLU(), "config": config()}, "ReLU: has no parameter that requires a grad"),
        ({"model": nn.Linear(2, 2).requires_grad_(False), "config": config()}, "requires_grad_()"),
        (
            {"model": nn.Linear(1, 1), "config": config(), "dist_init_required": True},
            "start with torchrun",
        ),
        (
            {"model": nn.Linear(1, 1), "config": {"train_batch_size": 1}},
            'add an "optimizer" section',
        ),
        (
            {"model": nn.Linear(1, 1), "config": config(train_micro_batch_size_per_gpu=3)},
            "do not fit 1 rank",
        ),
        (
            {"model": nn.Linear(1, 1), "config": config(compile={"machine": "/none.json"})},
            "compile.machine: '/none.json' is neither a file nor",
        ),
        (
            {
                "model": nn.Linear(1, 1),
                "config": config(),
                "lr_scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau,
            },
            "needs a metric",
        ),
    ],
)
def test_initialize_errors(kwargs, expected):
    assert expected in error_of(lambda: deepcompile.initialize(**kwargs))


def test_parameters_keep_identity_and_shape():
    model = small()
    before = {n: (id(p), p.shape) for n, p in model.named_parameters()}
    engine = start(model)
    assert {n: (id(p), p.shape) for n, p in engine.named_parameters()} == before
    assert model[0].weight.untyped_storage().nbytes() == 0
    assert engine.module is model and engine.training


def test_training_data_and_scheduler_from_the_config():
    data = [torch.randn(8) for _ in range(12)]
    schedule = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_num_steps": 2}}
    engine, optimizer, loader, scheduler = deepcompile.initialize(
        model=small(), config=config(scheduler=schedule), training_data=data
    )
    assert [b.shape for b in loader] == [(4, 8)] * 3
    assert engine.get_lr() == [0.0]
    for number in range(4):
        step(engine, number)
    assert engine.get_lr() == [0.1] == [g["lr"] for g in optimizer.param_groups]
    assert scheduler is engine.lr_scheduler


class Scaled(nn.Module):
    """A parameter that only reset_parameters knows how to begin."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(8))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.constant_(self.scale, 2.0)

    def forward(self, x):
        return x * self.scale


def test_meta_models_are_initialised():
    with torch.device("meta"):
        model = nn.Sequential(Scaled(), nn.Linear(8, 16), nn.Linear(16, 8))
        model[2].weight = nn.Parameter(torch.empty(8, 16, device="meta"))
    engine = start(model)
    state = engine.state_dict()
    assert torch.equal(state["0.scale"], torch.full((8,), 2.0))
    assert 0 < state["1.weight"].abs().max() < 1
    assert step(engine) > 0


def test_meta_model_of_hugging_face_keeps_its_ties():
    transformers = pytest.importorskip("transformers")
    tiny = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(tiny)
    engine = start(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.arange(8).view(1, 8)
    assert torch.isfinite(engine(input_ids=ids, labels=ids).loss)


def test_meta_module_without_initialiser_is_an_error():
    with torch.device("meta"):
        model = nn.Linear(2, 2)
        model.extra = nn.Parameter(torch.empty(3))
    assert "extra: Linear was built on the meta device" in error_of(lambda: start(model))

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.empty(2, device="meta"))

    assert "has no reset_parameters()" in error_of(lambda: start(nn.Sequential(Bare())))


# ---- optimizers


@pytest.mark.parametrize("decoupled", [True, False])
def test_users_optimizer_with_groups_equals_torch(decoupled):
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    reference, model = small(), small()

    def build(m):
        weights = [p for n, p in m.named_parameters() if n.endswith("weight")]
        biases = [p for n, p in m.named_parameters() if n.endswith("bias")]
        return kind(
            [{"params": weights, "weight_decay": 0.2, "betas": (0.8, 0.9)},
             {"params": biases, "lr": 3e-3, "weight_decay": 0.0}], lr=LR, eps=1e-7,
        )  # fmt: skip

    expected, mine = build(reference), build(model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(mine, 0.9)  # on the user's own optimizer
    other = torch.optim.lr_scheduler.ExponentialLR(expected, 0.9)
    engine = start(model, optimizer=mine, lr_scheduler=scheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(6):
            expected.zero_grad()
            reference(batch(number)).pow(2).mean().backward()
            expected.step()
            other.step()
            step(engine, number)
    for name, value in engine.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[name], rtol=1e-5, atol=1e-6)
    assert engine.get_lr() == pytest.approx([LR * 0.9**6, 3e-3 * 0.9**6])


def test_optimizer_function():
    engine = start(optimizer=lambda params: torch.optim.AdamW(params, lr=0.5))
    assert engine.get_lr() == [0.5]


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda m: torch.optim.SGD(m.parameters()), "torch.optim.sgd.SGD: is not available"),
        (lambda m: torch.optim.AdamW(m.parameters(), amsgrad=True), "amsgrad=True): is not supp"),
        (lambda m: torch.optim.AdamW([nn.Parameter(torch.ones(2))]), "is no parameter of the mod"),
        (lambda m: torch.optim.AdamW([m[0].weight]), "3.weight: requires a gradient but is in no"),
        (lambda m: 3, "pass a torch Adam or AdamW, or a function"),
    ],
)
def test_optimizers_that_are_refused(build, expected):
    model = small()
    assert expected in error_of(lambda: start(model, optimizer=build(model)))


def test_optimizer_with_history_is_refused():
    model = small()
    optimizer = torch.optim.AdamW(model.parameters())
    model(batch()).sum().backward()
    optimizer.step()
    assert "has taken steps already" in error_of(lambda: start(model, optimizer=optimizer))


def test_groups_are_fixed_and_the_optimizers_own_step_refused():
    engine = start()
    group = {"params": [nn.Parameter(torch.ones(1))]}
    assert "groups are fixed" in error_of(lambda: engine.optimizer.add_param_group(group))
    assert "call engine.step()" in error_of(lambda: engine.optimizer.step(lambda: 0))
    assert "call engine.step()" in error_of(engine.optimizer.step)


# ---- steps


def test_accumulation_counts_and_boundaries():
    engine = start(config=config(train_batch_size=12, gradient_accumulation_steps=3))
    assert engine.train_micro_batch_size_per_gpu() == 4
    seen = []
    for number in range(6):
        seen.append(engine.is_gradient_accumulation_boundary())
        step(engine, number)
    assert seen == [False, False, True] * 2
    assert (engine.micro_steps, engine.global_steps) == (6, 2)


def test_zero_grad_drops_gradients():
    engine = start(config=config(train_batch_size=8, gradient_accumulation_steps=2))
    twin = start(config=config(train_batch_size=8, gradient_accumulation_steps=2))
    engine.backward(engine(batch(5)).pow(2).mean())
    engine.zero_grad()
    for number in range(2):
        step(engine, number)
        step(twin, number)
    for name, value in engine.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name])


def test_calls_out_of_order_are_errors():
    engine = start()
    assert "no backward(loss)" in error_of(engine.step)
    with torch.no_grad():
        loss = engine(batch()).sum()
    assert "under no_grad" in error_of(lambda: engine.backward(loss))
    assert "one element" in error_of(lambda: engine.backward(engine(batch())))
    with pytest.raises(UserError, match="Call that instead of loss.backward"):
        engine(batch()).sum().backward()
    loss = engine(batch()).pow(2).mean()
    assert "not supported" in error_of(lambda: engine.backward(loss, retain_graph=True))


def test_the_modules_own_state_is_refused_while_it_has_no_memory():
    engine = start()
    assert "call engine.state_dict()" in error_of(engine.module.state_dict)
    state = engine.state_dict()
    assert "before initialize()" in error_of(lambda: engine.load_state_dict(state))
    with deepcompile.GatheredParameters(engine, engine.parameters(), modifier_rank=0):
        engine.load_state_dict({name: value + 1 for name, value in state.items()})
    for name, value in engine.state_dict().items():
        assert torch.equal(value, state[name] + 1)


@pytest.mark.parametrize("bf16", [False, True])
def test_values_loaded_into_whole_parameters_are_not_lost(bf16):
    extra = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": bf16}}
    engine = start(config=config(**extra))
    state = {name: value * 2 for name, value in engine.state_dict().items()}
    message = error_of(lambda: engine.load_state_dict(state))
    assert "optimizer's own value of 0.weight" in message and "GatheredParameters" in message
    with deepcompile.GatheredParameters(engine, engine.parameters(), modifier_rank=0):
        engine.load_state_dict(state)
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    loss = engine(batch().to(next(engine.parameters()).dtype)).pow(2).mean()
    engine.backward(loss)
    engine.step()
    assert all(torch.equal(value, state[name]) for name, value in engine.state_dict().items())


def test_more_engines_than_recompilations_all_run_compiled():
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        engine = start(nn.Linear(8, 1))
        engine.compile(backend="eager")
        step(engine)
        assert len(engine.planner.graphs) == 1


def test_training_in_evaluation_mode_says_so():
    engine = start()
    engine.compile(backend="eager")
    engine.eval()
    with pytest.warns(UserWarning, match="the model is in evaluation mode.*Call engine.train"):
        step(engine)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(engine, 1)


def test_grad_norm_only_with_clipping():
    engine = start()
    step(engine)
    assert engine.get_global_grad_norm() is None
    engine = start(config=config(gradient_clipping=1.0))
    step(engine)
    assert engine.get_global_grad_norm() > 0


def test_unknown_attribute_names_the_model():
    engine = start()
    with pytest.raises(AttributeError, match="neither the engine nor Sequential has 'nope'"):
        _ = engine.nope


def test_printed_line(capsys):
    engine = start(config=config(steps_per_print=2, wall_clock_breakdown=True))
    for number in range(3):
        step(engine, number)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("step 2: loss ") and "backward" in lines[0]


@pytest.mark.parametrize("backend", [None, "eager"])
def test_nothing_stays_gathered(backend):
    engine = start()
    if backend is not None:
        engine.compile(backend=backend)
    weights = [engine.module[0].weight, engine.module[3].weight]
    step(engine)
    assert [w.untyped_storage().nbytes() for w in weights] == [0, 0]
    with torch.no_grad():
        engine(batch())
    assert [w.untyped_storage().nbytes() for w in weights] == [0, 0]
    held = engine.runtime.buffer_report()
    assert held["saved"] == held["gradients"] == held["reductions"] == 0


def test_a_forward_without_backward_leaves_nothing():
    engine = start()
    engine.compile(backend="eager")
    loss = engine(batch()).pow(2).mean()
    assert engine.runtime.buffer_report()["saved"] > 0
    del loss
    assert engine.runtime.buffer_report()["saved"] == 0
    assert step(engine) > 0


class WithLogits(nn.Module):
    """Returns what its own backward saves, as language models return their logits."""

    def __init__(self):
        super().__init__()
        self.body = small()

    def forward(self, x):
        logits = torch.tanh(self.body(x))
        return {"loss": logits.pow(2).mean(), "logits": logits}


def test_a_saved_output_does_not_keep_its_call_alive():
    engine = start(WithLogits())
    engine.compile(backend="eager")
    for _ in range(2):
        output = engine(batch())
        assert engine.runtime.buffer_report()["saved"] > 0
        del output
        assert engine.runtime.buffer_report()["saved"] == 0


def test_gathered_parameters_nest_and_stay_through_a_forward():
    engine = start()
    weight = engine.module[0].weight
    with deepcompile.GatheredParameters(engine, weight, modifier_rank=0):
        with deepcompile.GatheredParameters(engine, weight):
            pass
        engine(batch())
        engine.state_dict()
        weight.data.zero_()
    assert weight.untyped_storage().nbytes() == 0
    assert not engine.state_dict()["0.weight"].any()
    engine.compile(backend="eager")
    with pytest.raises(UserError, match="0.weight was released inside"):  # noqa: SIM117
        with deepcompile.GatheredParameters(engine, weight, modifier_rank=0):
            engine(batch())


def test_unfreezing_after_initialize_is_an_error():
    model = small()
    model[0].requires_grad_(False)
    engine = start(model)
    model[0].requires_grad_(True)
    assert "0.weight: requires a gradient since" in error_of(lambda: step(engine))


# ---- compile


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = x + torch.tanh(self.first(x))
        torch._dynamo.graph_break()
        return x + self.last(x)


class Blocks(nn.Module):
    """The break is inside a loop, so Dynamo compiles Block.forward by itself."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(("stage", "threshold"), [(0, 10), (3, 10), (3, 100_000)])
def test_code_of_one_block_is_not_run_for_another(stage, threshold):
    torch._dynamo.reset()  # Block.forward's compilations of other engines count towards the limit
    zero = {"stage": stage, "stage3_param_persistence_threshold": threshold}
    compiled, eager = (
        start(seeded(Blocks, 0), config=config(zero_optimization=zero)) for _ in range(2)
    )
    compiled.compile(backend="eager")
    for number in range(3):
        assert step(compiled, number) == pytest.approx(step(eager, number), rel=1e-5)
    assert len(compiled.planner.graphs) == 6


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"backend": "xla"}, "use inductor or eager"),
        ({"compile_kwargs": {"mode": "x"}}, "use dynamic, fullgraph or options"),
        ({"schedule": [(0, ["prefetch_all"])]}, "no pass named 'prefetch_all'; did you mean"),
        ({"schedule": [(0, ["prefetch", "zero3_compile"])]}, "prefetch: needs gathers_placed"),
        (
            {"schedule": [(0, ["zero3_compile"]), (5, ["selective_gather"])]},
            "selective_gather: needs gathers_placed, which no earlier pass of the entry at step 5",
        ),
        ({"schedule": [(0, ["zero3_compile"]), (2, [])]}, "the entry at step 2 has no pass that"),
        ({"schedule": [(3, ["zero3_compile"])]}, "they must begin at 0"),
        ({"schedule": [(0, ["zero3_compile"]), (0, [])]}, "they must begin at 0 and increase"),
        ({"schedule": ["zero3_compile"]}, "is not (step, [passes])"),
        ({"schedule": [(0, ["zero3_compile", "zero3_compile"])]}, "zero3_compile"),
        ({"schedule": [(0, [])]}, "["),
    ],
)
def test_compile_errors(kwargs, expected):
    engine = start()
    assert expected in error_of(lambda: engine.compile(**kwargs))
    assert not engine.is_compiled


def test_compile_switched_off_or_asked_for_too_much():
    engine = start(config=config(compile={"deepcompile": False}))
    with pytest.warns(UserWarning, match="training stays eager"):
        engine.compile()
    assert not engine.is_compiled and not engine.is_deepcompile_enabled()
    engine = start()
    with pytest.warns(UserWarning, match="compiled_autograd_enabled has no effect"):
        engine.compile(backend="eager", compiled_autograd_enabled=True)


def test_pass_names_are_taken_once():
    engine = start()
    engine.register_compile_pass("mine", lambda program, context: None)
    assert "exists" in error_of(lambda: engine.register_compile_pass("mine", print))
    assert "exists" in error_of(lambda: engine.register_compile_pass("zero3_compile", print))


def test_compiled_run_checkpoint_and_report(tmp_path):
    engine, twin = start(), start()
    engine.compile(backend="eager")
    engine.compile(backend="inductor")  # the second call does nothing
    assert engine.is_compiled and engine.get_compile_time() == []
    losses = [step(engine, n) for n in range(4)]
    assert losses == pytest.approx([step(twin, n) for n in range(4)], rel=1e-5)
    rows = engine.get_compile_time()
    assert [row[:3] for row in rows] == [("fwd", 0, 0), ("bwd", 0, 0)]
    assert all(row[3] >= 0 for row in rows) and rows[0][3] > 0
    counts = engine.compile_report()
    assert counts["graphs"] == 1 and counts["regions"] >= counts["distinct_regions"] > 0
    assert {"dynamo", "aot", "cut", "compile", "passes"} <= set(counts["stages"])
    assert counts["kernels"] == {"adamw": "cpu", "norm": "cpu", "library": "this is a CPU"}

    assert engine.report(tmp_path / "report.html", notes=["hello"]).exists()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "hello" in page and "zero3_compile" in page
    assert "traceEvents" in engine.write_trace(tmp_path / "trace.json").read_text()

    folder = engine.save_checkpoint(tmp_path / "checkpoints")
    other = start()
    assert other.load_checkpoint(tmp_path / "checkpoints") == (str(folder), {})
    assert other.global_steps == 4
    expected = step(engine, 4)
    assert step(other, 4) == pytest.approx(expected, rel=1e-6)


def test_load_without_a_checkpoint_warns(tmp_path):
    with pytest.warns(UserWarning, match="has no checkpoint yet"):
        assert start().load_checkpoint(tmp_path) == (None, {})
    file = tmp_path / "file"
    file.write_text("")
    assert "cannot be read" in error_of(lambda: start().load_checkpoint(file))
    assert "cannot be written" in error_of(lambda: start().save_checkpoint(file))


@pytest.mark.parametrize("name", ["model.bin", "model.safetensors"])
def test_export(tmp_path, name):
    model = small()
    expected = copy.deepcopy(model.state_dict())
    path = start(model).save_16bit_model(tmp_path, name)
    if name.endswith(".bin"):
        read = torch.load(path, weights_only=True)
    else:
        read = pytest.importorskip("safetensors.torch").load_file(path)
    assert set(read) == set(expected)
    assert all(torch.equal(read[k], expected[k]) for k in expected)


def test_bf16_casts_what_is_saved_and_keeps_the_rest():
    model = small()
    model.register_buffer("kept", torch.ones(2), persistent=False)
    model.register_buffer("cast", torch.ones(2))
    engine = start(model, config=config(bf16={"enabled": True}))
    assert model.kept.dtype == torch.float32 and model.cast.dtype == torch.bfloat16
    assert {p.dtype for p in engine.parameters()} == {torch.bfloat16}
    state = engine.state_dict(fp32=True)
    assert state["0.weight"].dtype == torch.float32


def test_a_dropped_engine_gives_its_memory_back():
    engine = start()
    engine.compile(backend="eager")
    for number in range(2):
        step(engine, number)
    runtime, model = weakref.ref(engine.runtime), engine.module
    del engine
    gc.collect()
    assert model(batch()).shape == (4, 4) and runtime() is not None  # which gathers for the model
    del model
    gc.collect()
    assert runtime() is None
