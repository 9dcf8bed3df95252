"""The Triton kernel, run by Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

CODE = """
import torch
from fewer.optimization.mfac.window.kernels import fused_products

for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for m, d in ((1, 1), (70, 300), (32, 128)):
        grads, x, y = torch.randn(m, d).to(dtype), torch.randn(d), torch.randn(m)
        products, sums = fused_products(grads, x, y)
        assert products.dtype == torch.float64
        torch.testing.assert_close(products, grads.double() @ x.double(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sums.double(), grads.double().T @ y.double(), rtol=1e-4, atol=1e-4)
        assert torch.equal(fused_products(grads, x=x)[0], products)
        assert torch.equal(fused_products(grads, y=y)[1], sums)
        assert fused_products(grads, y=y)[0].tolist() == [0.0] * m
print("same")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed; pip install triton")
def test_the_kernel_gives_both_products_in_every_storage():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "same", done.stderr
