# SPDX-License-Identifier: Apache-2.0
"""Runs captured sections in plain Python, and the comparison with eager PyTorch.

Parameters come from the module itself; gradients are summed by member name.
Everything is freed as the runtime frees it: a call's values go with its token
or its backward.
"""

import copy
import gc
import weakref

import numpy as np
import torch
from torch import nn

from deepcompile.capture import CaptureOptions, make_backend, make_entry, surface_errors
from deepcompile.errors import UserError
from deepcompile.params import MemberRef, ParamTable


class ReferenceRunner:
    def __init__(self, captured, sink):
        self.captured, self.sink = captured, sink
        self.sections = {s.kind: s for s in captured.ir.sections}
        self.regions = {r.name: r for r in captured.ir.regions}
        self.grads = {v.name: v.grad_of for v in captured.ir.values if v.grad_of is not None}
        backward = self.sections.get("backward")
        self.backward_reads = set()
        if backward is not None:
            for name in backward.regions:
                self.backward_reads.update(map(str, self.regions[name].inputs))
            self.backward_reads.update(backward.outputs)

    def _run(self, kind, env, inputs):
        section, table = self.sections[kind], self.sink.table
        assert len(inputs) == len(section.inputs)
        env.update(zip(section.inputs, inputs, strict=True))
        for name in section.regions:
            region = self.regions[name]
            args = [
                self.sink.weight(x) if isinstance(x, MemberRef) else env[x] for x in region.inputs
            ]
            outs = self.captured.codes[region.code](args)
            assert not args, "a region's code must empty its list"
            for value, out in zip(region.outputs, outs, strict=True):
                env[value] = out
                if value in self.grads:
                    ref = self.grads[value]
                    member = table.member(ref)
                    assert out.shape == member.shape and out.is_contiguous()
                    self.sink.add_grad(member.name, out)
        return [env[v] for v in section.outputs]

    def forward(self, inputs):
        env = {}
        outs = self._run("forward", env, inputs)
        self.sink.last_call += 1
        call = self.sink.last_call
        self.sink.calls[call] = {k: v for k, v in env.items() if k in self.backward_reads}
        memory = np.array([call])  # lives as long as the token's storage
        weakref.finalize(memory, self.sink.calls.pop, call, None)
        return torch.from_numpy(memory), outs

    def backward(self, call_id, inputs):
        if call_id not in self.sink.calls:
            raise UserError(f"[test] call {call_id} is over")
        return self._run("backward", self.sink.calls.pop(call_id), inputs)

    def inference(self, inputs):
        return self._run("inference", {}, inputs)


class ReferenceSink:
    def __init__(self, table):
        self.table = table
        self.calls, self.grads, self.last_call = {}, {}, 0
        self.full = {r: table.tensor(r).detach().clone() for r in table.refs()}

    def weight(self, ref):
        return self.full[ref]

    def add_grad(self, name, grad):
        self.grads[name] = self.grads[name] + grad if name in self.grads else grad.clone()

    def install(self, captured):
        return ReferenceRunner(captured, self)


class Compiled:
    """A model compiled over a reference sink, its parameters' storage emptied."""

    def __init__(
        self, model, *, threshold=100, entry=False, fullgraph=True, sink=ReferenceSink, **options
    ):
        torch._dynamo.reset()
        self.model = model
        self.table = ParamTable.build(model, persistence_threshold=threshold)
        self.sink = sink(self.table)
        for ref in self.table.refs():
            self.table.tensor(ref).untyped_storage().resize_(0)
        dynamic = options.pop("dynamic", False)
        self.options = CaptureOptions(**{"backend": "eager", **options})
        self.backend = make_backend(self.table, self.options, self.sink)
        self.call = torch.compile(
            make_entry(model) if entry else model,
            backend=self.backend,
            dynamic=dynamic,
            fullgraph=fullgraph,
        )

    def __call__(self, *args, **kwargs):
        with surface_errors():
            return self.call(*args, **kwargs)

    @property
    def graphs(self):
        return self.backend.graphs

    @property
    def grads(self):
        return self.sink.grads


def pair(make):
    """(reference, model to compile) with the same weights."""
    torch.manual_seed(0)
    model = make()
    return copy.deepcopy(model), model


def compare(make, run, *, steps=2, tol=1e-6, **kwargs):
    """Run ``run(model)`` -> loss compiled and eagerly; compare loss, gradients and buffers."""
    reference, model = pair(make)
    compiled = Compiled(model, **kwargs)
    for _ in range(steps):
        reference.zero_grad()
        compiled.grads.clear()
        loss, expected = run(compiled), run(reference)
        loss.backward()
        expected.backward()
        assert abs(loss.item() - expected.item()) <= tol * max(1, abs(expected.item()))
    wanted = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    assert set(compiled.grads) == set(wanted)
    for name, grad in wanted.items():
        torch.testing.assert_close(compiled.grads[name], grad, atol=tol, rtol=1e-4, msg=name)
    for (name, a), (_, b) in zip(reference.named_buffers(), model.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")
    gc.collect()
    assert not compiled.sink.calls, "saved values are left over"
    assert all(p.untyped_storage().nbytes() == 0 for p in model.parameters())
    return compiled


def llama(layers=2, hidden=64, **config):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=hidden, intermediate_size=2 * hidden,
            num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=128, use_cache=False, **config,
        )
    )  # fmt: skip


def mixtral(layers=2, hidden=64, **config):
    from transformers import MixtralConfig, MixtralForCausalLM

    made = MixtralConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=2 * hidden,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, num_local_experts=4, num_experts_per_tok=2,
        use_cache=False, **config,
    )  # fmt: skip
    made._experts_implementation = "batched_mm"
    return MixtralForCausalLM(made)


def tokens(batch=2, seq=32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (batch, seq), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}


def hf_loss(model, **kwargs):
    return model(**tokens(**kwargs)).loss


class Sequential(nn.Sequential):
    """Plain modules: names that begin with digits."""

    def __init__(self, width=16):
        layers = []
        for _ in range(4):
            layers += [nn.Linear(width, width), nn.ReLU()]
        super().__init__(*layers)
