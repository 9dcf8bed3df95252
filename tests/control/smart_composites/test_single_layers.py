"""Models of one layer, and models whose weights are computed: each kind alone as strict C, or refused with the call that mends it."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from fewer.control import PredictiveController, UnsupportedLayer, compile_controller, compile_to_c
from fewer.control._shared.toolchain import STRICT, build_library
from fewer.control.smart_composites.to_c import compiler

torch.set_num_threads(1)

ALONE = {
    "linear": (nn.Linear(3, 2), (3,)),
    "linear-1": (nn.Linear(1, 1), (1,)),
    "linear-no-bias": (nn.Linear(3, 20, bias=False), (3,)),
    "linear-rows": (nn.Linear(3, 2), (4, 3)),
    "conv1d": (nn.Conv1d(2, 3, 2), (2, 6)),
    "conv2d": (nn.Conv2d(1, 1, 1), (1, 1, 1)),
    "conv2d-wide": (nn.Conv2d(3, 18, 3, padding=1, groups=3), (3, 8, 8)),
    "batch-norm": (nn.BatchNorm1d(3), (3,)),
    "layer-norm": (nn.LayerNorm(4), (4,)),
    "max-pool": (nn.MaxPool1d(2), (2, 6)),
    "average-pool": (nn.AvgPool2d(2), (1, 4, 4)),
    "adaptive": (nn.AdaptiveAvgPool2d(1), (2, 4, 4)),
    "relu": (nn.ReLU(), (3,)),
    "softmax": (nn.Softmax(-1), (3,)),
    "gelu": (nn.GELU(), (1,)),
    "identity": (nn.Identity(), (3,)),
    "flatten": (nn.Flatten(), (2, 3)),
    "rnn": (nn.Sequential(nn.RNN(2, 3, batch_first=True)), (4, 2)),
}


def strict(*compiled):
    """No warning of the strictest flags, which the compiler's front end alone gives; one call of gcc for all, which names the file."""
    sources = [str(file) for each in compiled for file in each.files if file.suffix == ".c"]
    done = subprocess.run(["gcc", *STRICT, "-fsyntax-only", *sources], capture_output=True, text=True)
    assert not done.returncode, done.stderr


@pytest.fixture(scope="module", params=[{}, {"dtype": "double", "test": True}, {"dtype": "q15"}, {"quantize": "int8"}], ids=str)
def alone(request, tmp_path_factory):
    """How near to torch, and name -> (input, C): each layer alone with these settings, strict, all in one library.

    Code and stack are measured of the plain ones alone: the settings change numbers, not what is measured.
    """
    settings, folder, made = request.param, tmp_path_factory.mktemp("alone"), {}
    with pytest.MonkeyPatch.context() as patch:
        if settings:
            patch.setattr(compiler, "sizes_of", lambda texts: None)
        for name, (model, shape) in ALONE.items():
            if name != "rnn":
                torch.manual_seed(0)
                x, own = torch.randn(1, *shape), name.replace("-", "_")
                made[name] = x, compile_to_c(model.eval(), x, folder / own, name=own, **settings)
    strict(*(compiled for _, compiled in made.values()))
    (folder / "all.c").write_text("".join(f'#include "{compiled.source}"\n' for _, compiled in made.values()))
    library = build_library([folder / "all.c"], folder / "all.so")
    for _, compiled in made.values():
        compiled.build = lambda: library
    return 0.05 if "quantize" in settings else 1e-3 if settings.get("dtype") == "q15" else 1e-5, made


@pytest.mark.parametrize("name", [name for name in ALONE if name != "rnn"])
def test_a_layer_alone_is_strict_c_and_equals_torch(name, alone):
    near, made = alone
    x, compiled = made[name]
    wanted = ALONE[name][0](x).detach().numpy()[0]
    assert np.abs(compiled.predict(x.numpy()) - wanted).max() <= near * max(1.0, float(np.abs(wanted).max()))


def test_a_layer_alone_has_strict_derivatives(tmp_path, monkeypatch):
    monkeypatch.setattr(compiler, "sizes_of", lambda texts: None)
    made = []
    for sizes in ((1, 1), (3, 2), (2, 20)):
        for activation in (None, nn.Tanh, nn.Softplus, nn.GELU, nn.Sigmoid):
            model = nn.Sequential(nn.Linear(*sizes), *([activation()] if activation else []))
            made.append(compile_to_c(model, torch.zeros(1, sizes[0]), tmp_path / f"c{len(made)}", derivatives=True))
    strict(*made)


def test_a_controller_of_a_linear_layer_alone_is_strict_c(tmp_path, monkeypatch):
    monkeypatch.setattr(compiler, "sizes_of", lambda texts: None)
    model, made = nn.Linear(2, 1).double(), []
    for bounds in (None, (-1, 1)):
        for newton in ({"gauss_newton": False}, {"gauss_newton": True}):
            controller = PredictiveController(model, (1, 1), 1, bounds=bounds, past_inputs=0, past_outputs=0, max_iter=1, **newton)
            made.append(compile_controller(controller, tmp_path / f"c{len(made)}"))
    strict(*made)


def test_a_pruned_model_is_told_to_call_remove(tmp_path):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    prune.l1_unstructured(model[2], "weight", 0.5)
    with pytest.raises(
        UnsupportedLayer, match=r"2: its weight is pruned by a mask; call torch.nn.utils.prune.remove\(module, 'weight'\) first"
    ):
        compile_to_c(model, torch.zeros(1, 4), tmp_path / "c")
    torch.export.save(torch.export.export(model.eval(), (torch.zeros(1, 4),)), tmp_path / "pruned.pt2")
    with pytest.raises(UnsupportedLayer, match=r"prune.remove\(module, 'weight'\)"):
        compile_to_c(tmp_path / "pruned.pt2", None, tmp_path / "c")
    prune.remove(model[2], "weight")
    x = torch.randn(1, 4)
    assert np.allclose(compile_to_c(model, x, tmp_path / "c").predict(x.numpy()), model(x).detach().numpy()[0], atol=1e-5)


def test_a_parametrized_model_is_told_to_call_remove(tmp_path):
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 2)))
    with pytest.raises(
        UnsupportedLayer, match=r"0: its weight is computed by a parametrization; call .*remove_parametrizations\(module, 'weight'\)"
    ):
        compile_to_c(model, torch.zeros(1, 4), tmp_path / "c")


class InPlace(nn.Module):
    """ReLU in place on a value, of which a view is used afterwards where `viewed`."""

    def __init__(self, viewed: bool) -> None:
        super().__init__()
        self.first, self.relu, self.viewed = nn.Linear(3, 3), nn.ReLU(inplace=True), viewed

    def forward(self, x):
        h = self.first(x)
        before = h.view(1, 1, 3) if self.viewed else h
        return self.relu(h) + before.view(1, 3)


def test_a_value_changed_in_place_is_read_as_changed_or_refused(tmp_path):
    torch.manual_seed(0)
    model, x = InPlace(False), torch.randn(1, 3)
    assert np.allclose(compile_to_c(model, x, tmp_path / "once").predict(x.numpy()), model(x).detach().numpy()[0], atol=1e-6)
    with pytest.raises(UnsupportedLayer, match=r"relu: aten.relu_.default changes in place .* use inplace=False"):
        compile_to_c(InPlace(True), x, tmp_path / "again")


def test_a_program_exported_in_training_mode_is_refused(tmp_path):
    torch.export.save(torch.export.export(nn.Sequential(nn.Dropout(0.5), nn.ReLU()).train(), (torch.zeros(1, 3),)), tmp_path / "m.pt2")
    with pytest.raises(UnsupportedLayer, match="dropout in training mode"):
        compile_to_c(tmp_path / "m.pt2", None, tmp_path / "c")
