"""The Triton kernels, in Triton's interpreter: a fresh process, for it is chosen when Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
CODE = """
import torch
from fewer.signals import FlashFFTConv, fft_conv
from fewer.signals.flash_fft_conv import Plan

torch.manual_seed(0)

def run(dtype, given, n, backend):
    inputs = [each.to(dtype if i != 1 else torch.promote_types(dtype, torch.float32)).requires_grad_() for i, each in enumerate(given)]
    gates = dict(zip(("skip", "pregate", "postgate"), inputs[2:]))
    y = fft_conv(*inputs[:2], plan=Plan(n, (n,), backend, 8, 0.0, 0), **gates)
    return [y, *torch.autograd.grad(y, inputs, dout.to(y.dtype))]

for n, batch, channels, dtypes in ((256, 2, 3, (torch.float32, torch.bfloat16)), (1024, 2, 3, (torch.float32, torch.bfloat16)), (1024, 3, 2, (torch.float32,)), (8192, 1, 1, (torch.bfloat16,))):
    for dtype in dtypes:
        for gates in (0, 2):
            shape = (batch, channels, n // 2)
            given = [torch.randn(shape).to(dtype), torch.randn(shape[1:]) / 8, torch.randn(channels).to(dtype), *(torch.randn(shape).to(dtype) for _ in range(gates))]
            dout = torch.randn(shape).to(dtype)
            found, wanted = run(dtype, given, n, "triton"), run(torch.float64, given, n, "fft")
            for one, other in zip(found, wanted):
                error = ((one.double() - other).norm() / other.norm()).item()
                assert error < (1e-4 if dtype == torch.float32 else 2e-2), (n, dtype, gates, error)

u = torch.full((2, 3, 256), 100.0, dtype=torch.float16)
y = fft_conv(u, torch.ones(3, 256) / 256, plan=Plan(512, (512,), "triton", 8, 0.0, 0))
assert y.isfinite().all() and (y[..., -1] - 100).abs().max() < 0.5
k = torch.randn(3, 256)
torch.testing.assert_close(FlashFFTConv(256, backend="triton")(u.float() / 100, k), FlashFFTConv(256)(u.float() / 100, k), rtol=1e-4, atol=1e-3)
for words in ({"seqlen": 300}, {"seqlen": 128}):
    try:
        FlashFFTConv(backend="triton", **words)(torch.randn(1, 3, 100), torch.randn(3, 100))
    except ValueError as error:
        print(error)
try:
    FlashFFTConv(256, backend="triton")(torch.randn(1, 3, 256).double(), torch.randn(3, 256))
except ValueError as error:
    print(error)
print("same")
"""


def test_one_kernel_is_the_convolution_and_its_gradients():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
    assert done.stdout.strip().endswith("same"), done.stderr
    assert "n is 300; expected a power of two from 256 to 4194304 with backend='triton'" in done.stdout
    assert "n is 128; expected a power of two" in done.stdout
    assert "u is float64; expected float16, bfloat16 or float32 with backend='triton': use backend='fft'" in done.stdout
