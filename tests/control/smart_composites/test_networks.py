"""Random networks as C: equal to torch in float and double, clean under the sanitizers, NaN for NaN; recurrent ones step by step."""

from __future__ import annotations

import itertools
import shutil
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from fewer.control import compile_to_c
from fewer.control.smart_composites.problems import LastStep
from fewer.control.smart_composites.to_c.compiler import network_of
from fewer.control.smart_composites.to_c.text import DOUBLE, FLOAT

torch.set_num_threads(1)
SANITIZED = ("-O0", "-g0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
ACTIVATIONS = [
    nn.ReLU, lambda: nn.LeakyReLU(0.2), nn.Sigmoid, nn.Tanh, nn.ELU, nn.SELU, nn.Softplus, nn.Softsign, nn.Hardsigmoid, nn.GELU,
    lambda: nn.GELU(approximate="tanh"), nn.Identity,
]  # fmt: skip


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return torch.relu(x + self.inner(x))


class Sequence(nn.Module):
    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(layer.hidden_size, 2)

    def forward(self, x):
        return self.head(self.layer(x)[0])


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """A network of any depth, widths, kernels, strides, padding, dilation and groups, and the shape of its input."""

    def whole(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    def pick(*options):
        return draw(st.sampled_from(options))

    torch.manual_seed(whole(0, 10**6))
    kind = pick("mlp", "conv1", "conv2", "recurrent")
    if kind == "mlp":
        sizes = draw(st.lists(st.integers(1, 40), min_size=2, max_size=4))
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after, bias=draw(st.booleans())), pick(*ACTIVATIONS)()]
            more = pick(None, None, nn.BatchNorm1d, nn.LayerNorm, lambda size: Residual(nn.Linear(size, size)))
            layers += [more(after)] if more and not (more is nn.LayerNorm and after == 1) else []
        return nn.Sequential(*layers, *pick([], [nn.Softmax(-1)])), (sizes[0],)
    if kind == "recurrent":
        cell, inputs = pick(nn.RNN, nn.GRU, nn.LSTM), whole(1, 6)
        more = {"nonlinearity": pick("tanh", "relu")} if cell is nn.RNN else {}
        layer = cell(inputs, whole(1, 20), batch_first=True, bias=draw(st.booleans()), **more)
        return pick(lambda: LastStep(layer, 3), lambda: Sequence(layer))(), (whole(1, 6), inputs)
    one, groups = kind == "conv1", pick(1, 1, 2, 3)
    channels, middle = groups * whole(1, 3), groups * pick(1, 2, 3, 4, 5, 17)
    conv, norm = (nn.Conv1d, nn.BatchNorm1d) if one else (nn.Conv2d, nn.BatchNorm2d)
    pool = pick(nn.MaxPool1d, nn.AvgPool1d) if one else pick(nn.MaxPool2d, nn.AvgPool2d)
    layers = [conv(channels, middle, whole(1, 3), whole(1, 3), whole(0, 2), whole(1, 2), groups)]
    layers += [norm(middle)] * draw(st.booleans()) + [pick(*ACTIVATIONS)()]
    layers += pick([], [pool(2, whole(1, 2), whole(0, 1))]) + pick([], [], [norm(middle)]) + [nn.Flatten()]
    shape = (channels, whole(9, 13)) if one else (channels, whole(9, 13), whole(9, 13))
    features = nn.Sequential(*layers).eval()(torch.zeros(1, *shape)).shape[1]
    return nn.Sequential(*layers, nn.Linear(features, 3)), shape


def many(count: int, examples: int):
    """`count` networks at a time, since one call of gcc for all is much quicker than one for each."""
    together = given(st.lists(networks(), min_size=count, max_size=count))
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example, HealthCheck.function_scoped_fixture]
    return lambda test: settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, phases=[Phase.generate], suppress_health_check=checks
    )(together(test))


def traced(models):
    """With batch norms that have seen something, and as the compiler reads them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model, shape in models:
            for module in model.modules():
                if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                    module.running_mean = torch.randn(module.num_features)
                    module.running_var = torch.rand(module.num_features) + 0.5
            yield model.eval(), shape, network_of(model, torch.zeros(1, *shape))


def check(results, cases, tolerance: float, dtype: torch.dtype) -> None:
    """Within `tolerance` of torch's outputs, relative to the largest; NaN where torch says NaN of NaN."""
    for (x, out, nans), (model, shape, _) in zip(results, cases, strict=True):
        with torch.no_grad():
            wanted = model.to(dtype)(torch.as_tensor(x, dtype=dtype)[None]).numpy().ravel()
            of_nan = model(torch.full((1, *shape), torch.nan, dtype=dtype)).numpy().ravel()
        assert np.abs(out - wanted).max() <= tolerance * max(np.abs(wanted).max(), 1e-2), model
        assert np.array_equal(nans.astype(bool), np.isnan(of_nan)), model


@many(50, examples=4)
def test_200_random_networks_equal_torch_in_float_and_double_and_say_nan_of_nan(tmp_path, run_together, models):
    """40 of them in double under the sanitizers of addresses and undefined behaviour."""
    cases = list(traced(models))
    check(run_together(tmp_path / "f", cases, FLOAT), cases, 1e-5, torch.float32)
    check(run_together(tmp_path / "d", cases[:10], DOUBLE, SANITIZED), cases[:10], 1e-12, torch.float64)


@pytest.mark.skipif(not shutil.which("valgrind"), reason="valgrind is not installed")
@many(10, examples=2)
def test_valgrind_finds_nothing(tmp_path, run_together, models):
    run_together(tmp_path / "v", list(traced(models)), FLOAT, ("-O1", "-g"), ("valgrind", "-q", "--error-exitcode=9"))


@pytest.mark.parametrize("cell", [nn.RNN, nn.GRU, nn.LSTM])
def test_a_sequence_fed_step_by_step_equals_torch_on_the_whole(cell, tmp_path):
    torch.manual_seed(0)
    model, x = Sequence(cell(3, 8, batch_first=True)).eval(), torch.randn(1, 12, 3)
    compiled = compile_to_c(model, x[:, :1], tmp_path)
    wanted = model(x).detach().numpy()[0]
    for _ in range(2):
        compiled.reset()
        got = np.concatenate([compiled.predict(x[0, step].numpy()) for step in range(12)])
        assert np.abs(got - wanted).max() < 1e-5
    assert np.abs(compiled.predict(x[0, 0].numpy())[0] - wanted[0]).max() > 1e-4, "without a reset it goes on"
