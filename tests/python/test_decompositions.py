# SPDX-License-Identifier: Apache-2.0
"""The embedding's backward stays one operator, through Inductor too."""

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.compile_fx import compile_fx_inner

from deepcompile.capture import vector_checks
from deepcompile.capture.decompositions import KEPT_WHOLE, decomposition_table


def test_embedding_backward_is_its_own_kernel():
    seen = []

    def compiler(gm, inputs):
        seen.extend(n.target for n in gm.graph.nodes if n.target in KEPT_WHOLE)
        return compile_fx_inner(gm, inputs)

    backend = aot_autograd(
        fw_compiler=compiler, bw_compiler=compiler, decompositions=decomposition_table()
    )
    table = torch.nn.Embedding(50, 8)
    ids = torch.tensor([[3, 3, 7, 49, 3, 0]])
    weight = torch.randn(1, 6, 8)
    (table(ids) * weight).sum().backward()
    expected, table.weight.grad = table.weight.grad, None
    with vector_checks.remembered():
        torch.compile(lambda ids: (table(ids) * weight).sum(), backend=backend)(ids).backward()
    assert seen == list(KEPT_WHOLE)
    assert torch.equal(table.weight.grad, expected)
