"""A trained PyTorch network as dependency-free C, and a predictive controller on it that a microcontroller can run.

The compiler writes C99 without malloc, without variables of its own and without a library but math.h; flash, RAM and stack are told. The
controller is neural generalised predictive control: y(n+1) = f(u(n), ..., u(n-nd), y(n), ..., y(n-dd)) is learned, and

    J = sum_j (r_j - y_j)^T Q (r_j - y_j) + sum_j du_j^T Lambda du_j + sum [s/(u + r/2 - b) + s/(r/2 + b - u) - 4 s/r]

is minimised by a few Newton-Raphson steps U <- U - H^{-1} grad J a sample, with exact derivatives; it is written as C, too.

When to use it: a robot whose kinematics has no formula, or any small network on a microcontroller. When not: large networks, where a
runtime with tuned kernels is faster, or a plant with a good formula, where its model needs no learning.

Source: arXiv 2205.10940; the controller from Soloway and Haley (1996).

>>> import tempfile, torch
>>> from torch import nn
>>> from fewer.control import compile_to_c
>>> model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
>>> with tempfile.TemporaryDirectory() as folder:
...     compiled = compile_to_c(model, torch.zeros(1, 3), folder, name="arm")
...     text = compiled.source.read_text()
>>> "void arm_predict(const float in[ARM_INPUTS], float out[ARM_OUTPUTS], arm_state *state)" in text, compiled.macs, compiled.ram_bytes
(True, 40, 32)
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
