"""The Triton kernel, in Triton's interpreter: a fresh process, for it is chosen when Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
CODE = """
import torch
from fewer.lowbit import FORMATS, fake_quantize
from fewer.lowbit._shared import blocks, gpu_kernels
from fewer.lowbit._shared.formats import Rule

draw = torch.Generator().manual_seed(0)
for name in FORMATS:
    for shape, dim, dtype in (((37, 64), 1, torch.float32), ((64, 37), 0, torch.float32), ((3, 33, 5), 1, torch.bfloat16)):
        x = (torch.randn(shape, generator=draw) * torch.exp2(torch.randint(-40, 40, shape, generator=draw).float())).to(dtype)
        x[0].zero_()
        x.view(-1)[-1], x.view(-1)[3], x.view(-1)[-2] = -0.0, float("nan"), float("inf")
        made = blocks.prepare(x, FORMATS[name], dim, Rule(), None)
        out = torch.empty_like(made.blocks)
        gpu_kernels.cast_blocks(made.blocks, made.steps(), FORMATS[name].elements, Rule(), out)
        found, wanted = blocks.uncut(out, x.shape, dim), fake_quantize(x, name, dim)
        assert torch.equal(found.isnan(), wanted.isnan()), name
        assert torch.equal(found.nan_to_num().contiguous().view(torch.uint8), wanted.nan_to_num().view(torch.uint8)), (name, shape)

x = torch.full((400, 32), 2.3)
x[:, 0] = 6
for bits in (None, 8):
    rule = Rule("stochastic", torch.Generator().manual_seed(3), bits)
    made = blocks.prepare(x, FORMATS["mxfp4"], 1, rule, None)
    outs = []
    for _ in range(2):
        outs.append(torch.empty_like(made.blocks))
        gpu_kernels.cast_blocks(made.blocks, made.steps(), FORMATS["mxfp4"].elements, rule, outs[-1])
    assert (outs[0][:, 0] == 6).all() and not torch.equal(*outs)
    up = (outs[0][:, 1:] == 3).double()
    assert set(outs[0][:, 1:].unique().tolist()) == {2.0, 3.0}
    assert abs(up.mean().item() - 0.3) < 4 * (0.21 / up.numel()) ** 0.5 + 1 / 512
print("same")
"""


def test_the_kernel_gives_the_torch_paths_values():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
    assert done.stdout.strip().endswith("same"), done.stderr
