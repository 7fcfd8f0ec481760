# SPDX-License-Identifier: Apache-2.0
"""The benchmark's rank: arguments of the seed, weights, data, and a row from start to end."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepcompile.bench import arguments, batches, lines, one, peers, profiling, weights, worker
from deepcompile.bench.conditions import Condition
from deepcompile.bench.options import Options
from deepcompile.bench.peers import deepcompile as ours
from deepcompile.bench.peers import deepspeed as theirs
from deepcompile.bench.peers import overlap
from deepcompile.bench.peers.local import Local
from deepcompile.bench.results import Results, Row
from deepcompile.distributed import Ranks
from deepcompile.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CPU = Ranks(0, 1, torch.device("cpu"))
TINY = Condition(
    "llama-tiny", "single", num_layers=1, batch_size=2, seq_length=16, zero_stage=0, dtype="fp32"
)


def lm(*words: str, world: int = 4) -> tuple[Condition, Options]:
    return arguments.parse_lm(words, world)


def refusal(call) -> str:
    """What is said about arguments that are not taken: by argparse, or a UserError."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            call()
        except UserError as error:
            return str(error)
        except SystemExit:
            return said.getvalue()
    raise AssertionError("it was accepted")


# ---- arguments


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ("--model_name m/x", "model", "m/x"),
        ("--num_layers 3", "num_layers", 3),
        ("--batch_size 4", "batch_size", 4),
        ("--seq_length 2048", "seq_length", 2048),
        ("--gradient_accumulation_steps 8", "accumulation", 8),
        ("--activation_checkpointing", "activation_checkpointing", True),
        ("--zero_stage 1", "zero_stage", 1),
        ("--backend eager", "backend", "eager"),
        ("--passes prefetch,selective_gather", "passes", ("prefetch", "selective_gather")),
        ("--framework deepspeed --offload_opt_states", "offload_adam", True),
        ("--framework fsdp --settings best", "settings", "best"),
        ("--variant name=x --memory_budget 20GiB", "variant", "name=x,budget=20GiB"),
        ("--dtype fp32", "dtype", "fp32"),
        ("--seed 7", "seed", 7),
        ("--framework fsdp --compile", "framework", "fsdp_c"),
        ("--framework fsdp", "zero_stage", 3),
        ("--framework ddp", "framework", "ddp"),
        ("--framework singlegpu --compile", "framework", "single_c"),
        ("--framework deepspeed --zero_stage 1", "framework", "zero1"),
        ("--framework deepspeed --compile", "framework", "zero3_c"),
        ("--framework deepspeed --compile --deepcompile", "framework", "ds_deepcompile"),
        ("--compile", "compile", True),
    ],
)
def test_conditions_from_arguments(words, field, value):
    assert getattr(lm(*words.split())[0], field) == value


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ("", "bench_step", 30),
        ("", "warmup_step", 15),
        ("", "learning_rate", 2e-5),
        ("", "max_grad_norm", 1.0),
        ("", "num_epochs", 100),
        ("", "attn_impl", "sdpa"),
        ("--bench_step 9 --warmup_step 4", "bench_step", 9),
        ("--learning_rate 1e-3", "learning_rate", 1e-3),
        ("--max_grad_norm 0", "max_grad_norm", 0.0),
        ("--num_epochs 2", "num_epochs", 2),
        ("--print_interval 5", "print_interval", 5),
        ("--dataset_name ag_news", "dataset_name", "ag_news"),
        ("--attn_impl eager", "attn_impl", "eager"),
        ("--attn_impl spda", "attn_impl", "sdpa"),  # as the seed spells it
        ("--profile", "profile", True),
        ("--profile --profile_dir here", "profile_dir", "here"),
        ("--profile_dir a --result_dir b", "results", "b"),
        ("--profile_dir a", "results", "a"),
        ("--eval", "eval", True),
        ("--deterministic", "deterministic", True),
        ("--save_weights", "save_weights", True),
        ("--load_weights", "load_weights", True),
        ('--engine_config {"compile":{"debug_log":true}}', "engine", {"compile": {"debug_log": 1}}),
        ("--timeout 9", "timeout", 9.0),
    ],
)
def test_options_from_arguments(words, field, value, monkeypatch):
    monkeypatch.delenv("PROFILE_DIR", raising=False)
    assert getattr(lm(*words.split())[1], field) == value


def test_folders_of_results_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("PROFILE_DIR", "elsewhere")
    assert lm()[1].results == "elsewhere"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--attn_impl spdb", "invalid choice: 'spdb'"),
        ("--offload_opt_states", "ours moves to the host what its memory budget asks"),
        ("--framework ddp --offload_opt_states", "ddp keeps all on the device"),
        ("--framework singlegpu --offload_opt_states", "single keeps all on the device"),
        ('--framework fsdp --engine_config {"a":1}', "--engine_config: fsdp has no engine"),
        ("--passes prefech", "no pass named 'prefech'"),
        ("--framework fsdp --passes prefetch", "fsdp has none"),
        ("--framework fsdp --deepcompile", "the framework is fsdp"),
        ("--framework deepspeed --zero_stage 2", "compared at 1 and 3"),
        ("--framework ddp --memory_budget 1GiB", "ddp has none"),
        ("--settings best", "deepcompile has no best settings"),
        ("--framework singlegpu --compile --settings best", "single_c has no best settings"),
        ("--variant nonsense", "no variant 'nonsense'"),
        ("--variant budgt=3", 'did you mean "budget"?'),
        ("--variant budget=abc", "abc is not a size"),
        ("--variant budget=fsdp_d", 'did you mean "fsdp_c"?'),
        ("--memory_budget 3", "3 is 3 bytes: write 3GiB"),
        ("--framework fsdp --variant prefech", 'did you mean "prefetch"?'),
        ("--framework fsdp --variant overlap", "use fsdp_c"),
        ("--framework ddp --variant prefetch", "ddp has no variant"),
        ("--framework deepspeed --compile --deepcompile --passes offload_adam_states,prefetch",
         "goes alone"),
        ("--batch_size 0", "must be at least 1"),
        ("--bench_step 5 --warmup_step 5", "must be above warmup_step 5"),
        ("--profile --warmup_step 0", "warmup_step is 0"),
        ("--max_grad_norm -1", "max_grad_norm -1.0: must not be negative"),
        ("--engine_config {", "Give JSON"),
        ("--engine_config none.json", "No such file"),
        ("--batchsize 2", "unrecognized arguments: --batchsize"),
        ("--zero_stage 4", "--zero_stage"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_by_name(words, said):
    assert said in refusal(lambda: lm(*words.split()))


RUN = ["--backend", "fsdp", "--model", "org/M", "--zero-stage", "3", "--batch-size", "2",
       "--seq-length", "64", "--gradient-accumulation-steps", "4", "--activation-checkpointing",
       "--compile", "--eager", "--num-layers", "5", "--profile", "--profile-dir", "p",
       "--attn-impl", "eager", "--host-ip", "10.0.0.1"]  # fmt: skip


def test_run_sh_takes_the_seeds_options():
    condition, options = arguments.parse_run([*RUN, "--eval", "--bench_step", "40"], 8, 2)
    assert condition == Condition(
        "org/M", "fsdp_c", num_layers=5, batch_size=2, seq_length=64, accumulation=4,
        activation_checkpointing=True, compile=True, backend="eager", world=8, nodes=2,
        dtype=condition.dtype,
    )  # fmt: skip
    # --eval takes no value: what follows it is an option of its own.
    assert options.eval and options.bench_step == 40
    assert options.profile and options.profile_dir == "p" and options.attn_impl == "eager"


@pytest.mark.parametrize("backend", arguments.FRAMEWORKS)
def test_run_sh_knows_every_backend(backend):
    assert arguments.parse_run(["--backend", backend], 1, 1)[0].model.startswith("meta-llama/")


def test_run_sh_passes_deepspeeds_switches_on():
    words = ["--backend", "deepspeed", "--compile", "--deepcompile", "--debug-log", "--ds-offload"]
    words += [f"--{name}" for name in arguments.SYNC]
    condition, options = arguments.parse_run([*words, "--passes", "prefetch"], 4, 1)
    assert condition.framework == "ds_deepcompile" and condition.offload_adam
    switches = {"debug_log"} | {name.replace("-", "_") for name in arguments.SYNC}
    config = theirs.configuration(peers.Setup(condition, options, CPU))
    assert all(config["compile"][name] is True for name in switches)
    assert "unrecognized" in refusal(lambda: arguments.parse_run(["--ds-ofload"], 1, 1))
    # Beside a configuration of one's own, section by section.
    more = ["--engine_config", '{"compile": {"offload_activation": true}, "zero": 1}']
    _, options = arguments.parse_run([*words, *more], 4, 1)
    assert options.engine["compile"]["offload_activation"] is True
    assert options.engine["compile"]["debug_log"] is True
    assert options.engine["zero"] == 1


@pytest.mark.parametrize("switch", ["debug-log", *arguments.SYNC])
def test_run_sh_refuses_switches_where_there_is_no_engine(switch, capsys):
    for backend in ("fsdp", "ddp", "singlegpu"):
        said = refusal(lambda b=backend: arguments.parse_run(["--backend", b, f"--{switch}"], 4, 1))
        assert f"--{switch}: {backend[:6]}" in said and "Leave it out" in said
    _, options = arguments.parse_run([f"--{switch}"], 4, 1)  # ours
    ordered = switch != "debug-log"
    assert options.engine == ({} if ordered else {"compile": {"debug_log": True}})
    assert ("takes no notice" in capsys.readouterr().err) == ordered
    said = refusal(lambda: arguments.parse_run(["--ds-offload"], 4, 1))
    assert "give a budget: --memory_budget" in said


def test_logs_have_the_seeds_names():
    condition, _ = arguments.parse_run(RUN, 8, 2)
    condition = dataclasses.replace(condition, model="meta-llama/M", num_layers=0, dtype="bf16")
    name = arguments.log_name(condition, 1)
    assert name == "debug_n1_M_fsdp_np8z3c1dc0E1b2seq64g4a1pALL.log"
    other = dataclasses.replace(
        TINY, framework="deepcompile", passes=("prefetch", "selective_gather"), zero_stage=3,
        compile=True, variant="budget=1/2",
    )  # fmt: skip
    assert arguments.log_name(other) == (
        "debug_n0_llama-tiny_deepcompile_np1z3c1dc1E0b2seq16g1a0pprefetch_selective_gather"
        "_L1_budget=1-2_fp32.log"
    )


def test_models_of_one_name_have_files_of_their_own():
    models = ["ma/llama/config.json", "mb/llama/config.json", "mb/other/config.json", "a/llama",
              "b/llama", "llama", "/x/llama.json", "meta-llama/llama"]  # fmt: skip
    found = [dataclasses.replace(TINY, model=model) for model in models[:-1]]
    for name in (arguments.log_name, profiling.experiment, weights.folder_of):
        names = [str(name(c)) for c in found]
        assert len(set(names)) == len(names)
        assert "llama-" in names[0] and "other-" in names[2]
    # The seed's own models have the seed's names.
    assert arguments.log_name(dataclasses.replace(TINY, model=models[-1])) == (
        arguments.log_name(found[5])
    )


# ---- what peers are made from


def deep(**changes) -> Condition:
    return dataclasses.replace(TINY, framework="deepcompile", zero_stage=3, compile=True, **changes)


def test_our_schedules():
    assert ours.schedule(deep()) == [(0, ["zero3_compile"]), (3, ["auto"])]
    assert ours.schedule(deep(passes=("zero3_compile",))) == [(0, ["zero3_compile"])]
    both = deep(passes=("prefetch", "selective_gather"))
    later = (0, ["zero3_compile"]), (3, ["zero3_compile", "prefetch", "selective_gather"])
    assert ours.schedule(both) == list(later)
    assert ours.schedule(deep(), 20) == [
        (0, ["zero3_compile"]), (20, ["zero3_compile"]), (23, ["auto"])
    ]  # fmt: skip


def test_our_configuration():
    def config(options=None, **changes):
        return ours.configuration(peers.Setup(deep(**changes), options or Options(), CPU))

    assert config()["bf16"] == {"enabled": False} and config()["gradient_clipping"] == 1.0
    assert config(variant="budget=20GiB")["compile"]["memory_budget"] == "20GiB"
    assert config(variant="a,budget=0.5")["compile"]["memory_budget"] == 0.5
    # Without a planner of memory the marks are obeyed, as the peers do; with one they are hints.
    marked = config(activation_checkpointing=True, passes=("prefetch",))["compile"]
    assert marked["checkpoint_marks"] == "obey"
    assert "checkpoint_marks" not in config(activation_checkpointing=True)["compile"]
    more = Options(engine={"compile": {"region_bytes": 5}, "gradient_clipping": 2})
    assert config(more)["compile"]["region_bytes"] == 5
    assert config(more)["compile"]["loss_only"] is True


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"framework": "zero3"}, "not installed"),
        ({"framework": "ddp", "offload_adam": True}, "keeps all on the device"),
        ({"framework": "single", "world": 2}, "takes one rank, not 2"),
        ({"framework": "fsdp", "variant": "fast"}, "no variant 'fast'"),
        ({"framework": "fsdp", "variant": "overlap"}, "use fsdp_c"),
        ({"framework": "ddp", "variant": "fast"}, "no variant 'fast'"),
        ({"framework": "fsdp", "variant": "copy_engine"}, "copy_engine needs"),
    ],
)
def test_what_cannot_run_here_is_said(changes, said):
    condition = dataclasses.replace(TINY, **changes)
    reason = peers.why_not(condition)
    if reason is None and (said == "not installed" or torch.cuda.is_available()):
        pytest.skip("it can run here")
    assert said in reason
    with pytest.raises(UserError, match="bench"):
        peers.setup(condition, Options(), CPU)


def test_deepspeed_that_is_not_there_is_said(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda *_: None)
    for framework in ("zero1", "zero3", "ds_deepcompile"):
        reason = peers.why_not(dataclasses.replace(TINY, framework=framework))
        assert reason.startswith(f"deepspeed is not installed: {peers.INSTALL_DEEPSPEED}")
    page = (ROOT / "docs" / "measuring.md").read_text()
    assert f"`{peers.INSTALL_DEEPSPEED}`" in page  # the same advice


@pytest.mark.skipif(torch.cuda.is_available(), reason="it can run here")
def test_deepspeeds_deepcompile_on_a_cpu_is_not_called_uninstalled(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda *_: object())
    condition = dataclasses.replace(TINY, framework="ds_deepcompile", compile=True)
    reason = peers.why_not(condition)
    assert reason == "cannot run here: DeepSpeed's DeepCompile needs GPUs"
    assert worker.Row.failed(condition, reason).failure == "cannot run here"


@pytest.mark.parametrize(
    ("changes", "least"),
    [
        ({}, 4),
        ({"passes": ("prefetch",)}, 4),
        ({"passes": ("zero3_compile",)}, 0),
        ({"framework": "ds_deepcompile"}, 6),
        ({"framework": "ds_deepcompile", "zero_stage": 1}, 0),
        ({"framework": "fsdp_c"}, 0),
    ],
)
def test_the_warm_up_has_all_of_the_planning(changes, least):
    condition = dataclasses.replace(deep(), **changes)
    for warm in range(least):
        said = refusal(lambda w=warm: peers.check_warmup(condition, Options(warmup_step=w)))
        assert f"warmup_step {warm}:" in said and f"Give --warmup_step {least} or more" in said
    peers.check_warmup(condition, Options(warmup_step=least))


def test_one_condition_with_too_short_a_warm_up_is_refused(monkeypatch, capsys):
    words = ["--model_name", "llama-tiny", "--warmup_step", "2"]
    assert "Give --warmup_step 4 or more" in refusal(lambda: worker.parse(words))
    assert worker.parse([*words[:3], "4"])[1].warmup_step == 4
    monkeypatch.setenv("NGPUS_PER_NODE", "2")
    assert one.main(["--model", "llama-tiny", "--warmup_step", "2"]) == 2
    assert "Give --warmup_step 4 or more" in capsys.readouterr().err


def test_sharding_in_the_graph_refuses_tied_weights():
    condition = dataclasses.replace(
        TINY, model="gpt2", framework="fsdp_c", compile=True, variant="overlap", zero_stage=3
    )
    given = peers.Setup(condition, Options(), CPU)
    assert "tied weights are not supported" in refusal(lambda: overlap.Overlap(given))


def test_deepspeeds_configuration_is_the_seeds():
    condition = Condition("llama-tiny", "ds_deepcompile", compile=True, offload_adam=True)
    config = theirs.configuration(peers.Setup(condition, Options(), CPU))
    assert config["zero_optimization"] == {
        "stage": 3, "sub_group_size": 100_000_000, "leaf_module": {"classes": []},
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
    }  # fmt: skip
    assert config["compile"]["deepcompile"] and config["compile"]["double_buffer"]
    assert config["optimizer"]["params"]["betas"] == [0.9, 0.999]


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_at_its_best_overlaps_reductions_at_each_stage(stage):
    condition = Condition("llama-tiny", f"zero{stage}", zero_stage=stage)
    best = dataclasses.replace(condition, settings="best")
    usual, config = (
        theirs.configuration(peers.Setup(each, Options(), CPU)) for each in (condition, best)
    )
    zero = usual["zero_optimization"]  # DeepSpeed's own default is on at stage 3 alone
    assert config["zero_optimization"] == zero | ({"overlap_comm": True} if stage == 1 else {})
    assert config["optimizer"]["type"] == "AdamW" and "optimizer" not in usual


def test_deepspeeds_builder_gets_architectures_that_it_reads():
    assert theirs.plain_architectures("9.0a") == "9.0"
    assert theirs.plain_architectures("8.0;9.0a 10.0f+PTX") == "8.0;9.0 10.0+PTX"
    assert theirs.plain_architectures("Hopper") == "Hopper"


# ---- weights and data


def test_weights_depend_on_seed_and_name_alone():
    a, b = (weights.build("llama-tiny", num_layers=n, dtype=torch.float32) for n in (1, 2))
    for model in (a, b):
        weights.fill(model, CPU.device)
    deeper = dict(b.named_parameters())
    for name, parameter in a.named_parameters():
        assert torch.equal(parameter, deeper[name])
    assert torch.equal(a.model.norm.weight, torch.ones(128))
    assert abs(a.lm_head.weight.std().item() - 0.02) < 1e-3
    assert a.model.rotary_emb.inv_freq[0] == 1
    other = weights.values("lm_head.weight", (256, 128), CPU.device, seed=1)
    assert not torch.equal(a.lm_head.weight, other)


def test_tied_weights_stay_tied_and_bf16_is_rounded_once():
    model = weights.build("gpt2", num_layers=1)
    assert weights.has_ties(model)
    weights.fill(model, CPU.device)
    assert model.lm_head.weight is model.transformer.wte.weight
    full = weights.values("transformer.wte.weight", (50257, 768), CPU.device)
    assert torch.equal(model.lm_head.weight, full.bfloat16())


def test_models_by_their_names(tmp_path):
    assert weights.model_config("mistralai/Mixtral-8x7B-v0.1").num_local_experts == 8
    config = weights.model_config("llama-tiny").to_dict() | {"num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in (tmp_path, tmp_path / "config.json"):
        assert weights.model_config(str(name)).num_hidden_layers == 3
    assert "neither a file nor a built-in" in refusal(lambda: weights.model_config("llama-4"))


def test_tokens_are_bytes_or_words():
    text = torch.tensor(list(b"a b a, b a"), dtype=torch.uint8)
    assert batches.tokens(text, 256).tolist() == list(b"a b a, b a")
    # by frequency: " " and "a" lead
    assert batches.tokens(text, 5000).tolist() == [1, 0, 2, 0, 1, 3, 0, 2, 0, 1]


def test_a_data_set_out_of_reach_is_said(capsys, monkeypatch):
    def out_of_reach(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(batches, "load_dataset", out_of_reach)
    monkeypatch.setattr(batches, "_unreadable", {})
    text = batches.named_text("no/such-data-set", "", CPU)
    assert "as no/such-data-set cannot be read" in text.source
    assert text.facts()["data_problem"] == "ConnectionError: no network"
    assert "cannot be read" in capsys.readouterr().out


def test_a_data_set_out_of_reach_is_tried_once(monkeypatch):
    tried = []

    def out_of_reach(name, **kwargs):
        tried.append(name)
        raise ConnectionError("no network")

    monkeypatch.setattr(batches, "load_dataset", out_of_reach)
    monkeypatch.setattr(batches, "_unreadable", {})
    texts = [batches.named_text(name, "", CPU) for name in ("a/b", "a/b", "c/d")]
    assert tried == ["a/b", "c/d"] and texts[0] == texts[1]
    # Another process group is told by the sweep.
    batches._unreadable.clear()
    assert batches.named_text("a/b", "no network", CPU).problem == "no network"
    assert tried == ["a/b", "c/d"]


# ---- steps


def test_one_condition_from_weights_to_row(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = Options(
        bench_step=5, warmup_step=2, eval=True, profile=True, save_weights=True, learning_rate=1e-2
    )
    (row,) = worker.run_conditions([TINY], options, CPU)
    assert len(row.times) == 1 and len(row.times[0]) == 3 and len(row.losses) == 5
    assert row.losses[-1] < row.losses[0]
    assert row.peak_bytes >= row.alloc_bytes > 0 and row.compile_seconds == 0
    assert row.effective["masters"] == "float32" and row.effective["eval_loss"] > 0
    assert row.model_flops > 0 and row.effective["bench_step"] == 5
    assert row.effective["allocator"] and row.effective["alloc_retries_of_ranks"] == [0]
    assert row.versions["torch"] == torch.__version__ and row.machine["device"]
    (read,) = Results.load("profiles").rows
    assert read.as_dict() == json.loads(json.dumps(row.as_dict()))
    out = capsys.readouterr().out
    assert len(re.findall(r"^Epoch 1, Step \d, Loss: .* sync: True time: .* alloc_mem: \d+ "
                          r"peak_mem: \d+$", out, re.M)) == 5  # fmt: skip
    assert len(list((tmp_path / "profiles").glob("llama-tiny_np1ds0B*/trace.json"))) == 1
    assert (tmp_path / "llama-tiny_cp_layer1" / "model.safetensors").is_file()
    again = dataclasses.replace(options, save_weights=False, load_weights=True, profile=False)
    (loaded,) = worker.run_conditions([dataclasses.replace(TINY, seed=0)], again, CPU)
    assert loaded.losses == row.losses


def test_what_a_cached_graph_of_the_overlap_peer_calls_is_there():
    """Inductor's passes, which bring the operators, do not run where its cache has the graph."""
    script = "import deepcompile.bench.peers.overlap, torch; torch.ops.bucketing.{}"
    name = "_pre_bucket_all_gather"
    subprocess.run([sys.executable, "-c", script.format(name)], check=True, capture_output=True)


def test_steps_in_a_row_wait_for_the_device_once(tmp_path):
    done = []

    class Meter:
        def begin(self):
            done.append("begin")

        def end(self):
            done.append("end")
            return 0.5

    class Peer:
        def step(self, micro):
            done.append(micro)

    assert worker.steps_in_a_row(Peer(), [[1, 2], [3, 4]], Meter()) == 0.25
    assert done == ["begin", [1, 2], [3, 4], "end"]

    # On a CPU there is nothing to wait for, so none are run; a row keeps what was found.
    options = Options(bench_step=2, warmup_step=1, result_dir=str(tmp_path))
    (row,) = worker.run_conditions([TINY], options, CPU)
    assert row.in_a_row is None
    row.in_a_row = 0.125
    assert Row.from_json(row.to_json()).in_a_row == 0.125
    with pytest.raises(UserError, match="in_a_row"):
        Row.from_json(row.to_json().replace('"in_a_row": 0.125', '"in_a_row": -1'))


def test_an_evaluation_is_not_in_the_rows_memory_and_compile_time(tmp_path, monkeypatch):
    order = []

    def noted(owner, name: str) -> None:
        usual = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a: order.append(name) or usual(*a))

    for owner, name in ((worker, "_row"), (worker, "_compile_seconds"), (Local, "evaluate")):
        noted(owner, name)
    options = Options(bench_step=2, warmup_step=1, eval=True, result_dir=str(tmp_path))
    worker.run_conditions([TINY], options, CPU)
    assert order == ["_row", "_compile_seconds", "evaluate"]


def test_lengths_of_one_model_share_it(tmp_path, monkeypatch):
    made = []
    setup = peers.setup
    monkeypatch.setattr(peers, "setup", lambda *a: made.append(a) or setup(*a))
    options = Options(bench_step=2, warmup_step=1, result_dir=str(tmp_path))
    longer = dataclasses.replace(TINY, seq_length=32)
    wider = dataclasses.replace(TINY, batch_size=1)
    assert len(worker.run_conditions([TINY, longer, wider], options, CPU)) == 3
    assert len(made) == 2


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("framework", ["single", "deepcompile"])
def test_each_condition_starts_from_the_first_weights(framework, dtype, tmp_path):
    """Also where the model is shared, and after an evaluation."""
    options = Options(
        bench_step=6, warmup_step=4, eval=True, learning_rate=1e-2, result_dir=str(tmp_path)
    )
    changes = {"compile": True, "zero_stage": 3} if framework == "deepcompile" else {}
    first = dataclasses.replace(TINY, framework=framework, dtype=dtype, backend="eager", **changes)
    longer = dataclasses.replace(first, seq_length=32)
    shared = worker.run_conditions([first, longer, first], options, CPU)
    (alone,) = worker.run_conditions([longer], options, CPU)
    assert shared[1].losses == pytest.approx(alone.losses, abs=1e-5)
    assert shared[2].losses == pytest.approx(shared[0].losses, abs=1e-5)
    assert shared[0].losses[-1] < shared[0].losses[0]
    assert {row.effective["starts_from"] for row in shared} == {worker.FIRST_WEIGHTS}
    reused = [row.compile_reused for row in [*shared, alone]]
    assert reused == [False, bool(changes), bool(changes), False]
    assert all(row.options == options.recorded(row.condition) for row in shared)


def test_a_peer_that_cannot_start_anew_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(peers.local.Local, "restart", peers.Peer.restart)
    options = Options(bench_step=2, warmup_step=1, result_dir=str(tmp_path))
    longer = dataclasses.replace(TINY, seq_length=32)
    rows = worker.run_conditions([TINY, longer], options, CPU)
    said = [row.effective["starts_from"] for row in rows]
    assert said == [worker.FIRST_WEIGHTS, worker.TRAINED_ON]


def test_a_job_for_other_ranks_and_too_few_epochs_are_errors(tmp_path):
    options = Options(result_dir=str(tmp_path))
    many = dataclasses.replace(TINY, framework="ddp", world=4)
    assert "for 4 ranks" in refusal(lambda: worker.run_conditions([many], options, CPU))
    assert worker.count_steps(Options(num_epochs=2), 100, 8) == 25
    assert "20 steps of data" not in refusal(lambda: worker.count_steps(options, 1, 10))
    assert worker.parse(["--job", lines.job_text([TINY], options)]) == ([TINY], options)
    assert "Give what the sweep writes" in refusal(lambda: worker.parse(["--job", "{}"]))


def test_a_budget_may_be_a_peers_peak(tmp_path):
    condition = deep(variant="budget=fsdp_c")
    options = Options(result_dir=str(tmp_path))
    said = refusal(lambda: worker.with_budget(condition, options))
    assert "no row of fsdp_c" in said
    peer = dataclasses.replace(TINY, framework="fsdp_c", zero_stage=3, compile=True)
    row = worker.Row.measured(peer, [[1.0]], peak_bytes=12345)
    worker.results.append(tmp_path, row)
    assert worker.with_budget(condition, options).variant == "budget=12345"
    row.peak_bytes, row.options = 99, dataclasses.replace(options, eval=True).recorded(peer)
    worker.results.append(tmp_path, row)
    assert worker.with_budget(condition, options).variant == "budget=99"
    row.peak_bytes, row.options = 98, dataclasses.replace(options, attn_impl="eager").recorded(peer)
    worker.results.append(tmp_path, row)
    assert worker.with_budget(condition, options).variant == "budget=99"  # not of other options
