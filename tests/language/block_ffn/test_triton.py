"""The Triton kernels, in Triton's interpreter: a fresh process, for it is chosen when Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
CODE = """
import torch
from fewer.language import BlockFFN

torch.manual_seed(0)
for dtype, near in ((torch.float32, 1e-5), (torch.float16, 5e-3)):
    layer = BlockFFN(72, 5, 20, kernel="triton")
    layer.reset_parameters(0.3)
    layer = layer.to(dtype)
    for tokens in (1, 17):
        with torch.no_grad():
            x = torch.randn(tokens, 72).to(dtype)
            logits = layer.router_proj(x)
            gates, active = layer.gates(logits), layer.active(logits)
            used = active.any(0)
            wanted = layer.mix(x, gates, active, "union")
            unread = ~used.repeat_interleave(20)
            before = layer.up_proj.clone(), layer.down_proj.clone()
            layer.up_proj[unread] = torch.nan
            layer.down_proj[:, unread] = torch.nan
            found = layer.mix(x, gates, active)
            layer.up_proj.copy_(before[0]), layer.down_proj.copy_(before[1])
            assert torch.allclose(found, wanted, rtol=near, atol=near * wanted.abs().max().item()), (dtype, tokens)
            none = torch.zeros_like(active)
            assert not layer.mix(x, gates * 0, none).any()
for raised, run in ((RuntimeError, lambda: layer(torch.randn(2, 72).half())), (TypeError, lambda: layer.double().requires_grad_(False)(torch.zeros(1, 72).double()))):
    try:
        run()
    except raised as error:
        print(error)
"""


def test_triton_gives_what_the_loop_gives_and_reads_no_inactive_expert():
    done = subprocess.run([sys.executable, "-c", CODE], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "a gradient is wanted and the triton kernel has none" in done.stdout
    assert "x is float64; expected float32, bfloat16 or float16" in done.stdout
