"""What cannot be done is told in one clear error: what was given, what was expected, what to do."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fewer.errors import UserError
from fewer.signals import (
    FNO,
    T1,
    ModeDataset,
    ModeLoss,
    burgers,
    dct,
    navier_stokes,
    select_modes,
    spectral_resize,
    truncated_dct,
    vp_std,
)
from fewer.signals.transform_once import study as module
from fewer.study import Scale

MODEL = T1((4, 4), 4, resolution=(8, 8))
ONES = torch.ones(3, 1, 8, 8)


def with_value(value, sample=1):
    fields = torch.randn(3, 1, 8, 8)
    fields[sample] = value
    return fields


CALLS = {
    "n_modes is (9, 4) and the resolution (8, 8); expected 1 to n on every axis: take fewer modes": lambda: T1((9, 4), 4, resolution=(8, 8)),
    "n_modes[0] is 0; expected a whole number of at least 1": lambda: T1((0, 4), 4, resolution=(8, 8)),
    "there are 1 n_modes (4,) and 2 axes (8, 8); expected one an axis": lambda: T1((4,), 4, resolution=(8, 8)),
    "n_modes is (2, 2, 2, 2); expected 1, 2 or 3 axes": lambda: T1((2,) * 4, 4, resolution=(4,) * 4),
    "init is 'xavier'; expected one of vp-first, vp-all, naive, kaiming": lambda: T1((4,), 4, resolution=(8,), init="xavier"),
    "basis is 'dst'; expected one of dct, fourier": lambda: T1((4,), 4, resolution=(8,), basis="dst"),
    "head_scale is 0; expected a finite number above 0": lambda: T1((4,), 4, resolution=(8,), head_scale=0),
    "x has resolution (16, 16) and the model (8, 8); expected the model's: resize with spectral_resize(x, (8, 8)), or make T1 with "
    "resolution=(16, 16)": lambda: MODEL(torch.ones(1, 1, 16, 16)),
    "x has shape (1, 1, 8); expected [B, channels] and 2 axes, as many as n_modes (4, 4)": lambda: MODEL(torch.ones(1, 1, 8)),
    "x is torch.complex64; expected real floating-point fields": lambda: MODEL(ONES.cfloat()),
    "z is torch.float32 of shape (3, 2, 4, 4); expected real numbers [B, 1, 4, 4]: call to_modes": lambda: MODEL.forward_modes(torch.ones(3, 2, 4, 4)),
    "z is torch.complex64 of shape (3, 1, 4, 4); expected real": lambda: MODEL.forward_modes(torch.ones(3, 1, 4, 4).cfloat()),
    "z is torch.complex64 of shape (3, 2, 4, 4); expected real": lambda: MODEL.from_modes(torch.ones(3, 2, 4, 4).cfloat()),
    "z is torch.float32 of shape (3, 4); expected real numbers [B, 4, 4, 4]: modes come from": lambda: MODEL.from_modes(torch.ones(3, 4)),
    "z has shape (3, 1, 4, 4) and the targets (2, 1, 4, 4); expected the same": lambda: (loss := ModeLoss(model=MODEL))(
        MODEL.to_modes(ONES), loss.prepare(ONES[:2])
    ),
    "x is torch.float32 of shape (0, 1, 8, 8); expected real floating-point fields [N, channels, n...], N >= 1": lambda: ModeDataset(
        ONES[:0], ONES[:0], MODEL
    ),
    "size is 0; expected a whole number of at least 1": lambda: list(ModeDataset(ONES, ONES, MODEL).batches(0)),
    "batch is 0; expected a whole number of at least 1": lambda: ModeDataset(ONES, ONES, MODEL, batch=0),
    "n_modes[1] is 0; expected a whole number of at least 1": lambda: FNO((4, 0), 4),
    "x is torch.float32 of shape (3, 8, 8); expected real fields [B, 1] and 2 axes": lambda: FNO((4, 4), 4)(torch.ones(3, 8, 8)),
    "x is torch.complex64 of shape (3, 1, 8, 8); expected real": lambda: FNO((4, 4), 4)(ONES.cfloat()),
    "basis is 'dst'; expected one of dct": lambda: truncated_dct(ONES, 2, "dst"),
    "w0 has shape (2, 8, 8); expected [N, 16, 16]": lambda: navier_stokes(2, 16, w0=torch.ones(2, 8, 8)),
    "u0 has shape (8,); expected [N, 8]": lambda: burgers(1, 8, u0=torch.ones(8)),
    "x is torch.complex64; expected real floating-point fields: resize": lambda: spectral_resize(ONES.cfloat(), 16),
    "n_modes is (4, 4) and the resolution (3, 8); expected 1 to n on every axis": lambda: MODEL.from_modes(torch.ones(3, 1, 4, 4), (3, 8)),
    "x has a NaN or infinite value in sample 1; expected finite fields: drop that sample": lambda: ModeDataset(with_value(np.nan), ONES, MODEL),
    "y has a NaN or infinite value in sample 2": lambda: ModeDataset(ONES, with_value(np.inf, 2), MODEL),
    "y is zero everywhere in sample 1, where a relative error means nothing": lambda: ModeDataset(ONES, with_value(0.0), MODEL, batch=1),
    "x has 3 samples and y 2; expected as many: one target an input": lambda: ModeDataset(ONES, ONES[:2], MODEL),
    "y has resolution (4, 4) and the model (8, 8); expected the model's": lambda: ModeLoss(model=MODEL).prepare(ONES[..., :4, :4]),
    "p is 1; expected 2: other norms are not the same on modes": lambda: ModeLoss(1),
    "no model is given; expected the T1 whose modes are meant: prepare(y, model)": lambda: ModeLoss().prepare(ONES),
    "floor is 1; expected a number between 0 and 1": lambda: select_modes(ONES, floor=1),
    "floor is 0.0; expected a number between 0 and 1": lambda: select_modes(ONES, floor=0.0),
    "floor is None and top_k None; expected one of them": lambda: select_modes(ONES),
    "top_k is 65 and there are 64 modes; expected at most that: take fewer": lambda: select_modes(ONES, top_k=65),
    "Y is zero everywhere in sample 0": lambda: select_modes(0 * ONES, top_k=1),
    "x is torch.complex64; expected real floating-point numbers": lambda: dct(ONES.cfloat(), 1),
    "norm is 'forward'; expected one of ortho, backward": lambda: dct(ONES, 1, "forward"),
    "n_modes is (9,) and the resolution (8,)": lambda: truncated_dct(ONES, 9),
    "kind is 'half'; expected one of diagonal, full": lambda: vp_std(8, 4, kind="half"),
    "dt is 0; expected a finite number above 0": lambda: navier_stokes(1, 8, dt=0),
}  # fmt: skip


@pytest.mark.parametrize(("message", "call"), CALLS.items(), ids=range(len(CALLS)))
def test_what_cannot_be(message, call):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        call()
    assert message in str(caught.value)


def test_weights_of_another_basis_or_of_a_broken_directory_are_refused(tmp_path):
    other = T1((4, 4), 4, resolution=(8, 8), basis="fourier")
    with pytest.raises(
        ValueError, match="the weights are for basis 'fourier' and the model's is 'dct'; expected the same: make T1 with it"
    ):
        MODEL.load_state_dict(other.state_dict())
    MODEL.save_pretrained(tmp_path / "model")
    with pytest.raises(FileExistsError, match="is not empty; expected a new directory"):
        MODEL.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for change, message in (
        ({"model": "FNO"}, "is of a FNO; expected T1"),
        ({"hidden_channels": 5}, "does not fit config.json"),
        ({"depth": 3}, "does not fit"),
    ):
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            T1.from_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        T1.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.ones((6, 8, 8))}, "has no array 'y'"),
        ({"x": np.ones((6, 8, 8)), "y": np.ones((6, 9, 8))}, "expected as many samples, at one resolution"),
        ({"x": np.ones((3, 8)), "y": np.ones((3, 8))}, "expected numbers [N, n], [N, n, n] or [N, channels, n, n], N >= 5"),
        ({"x": np.full((6, 8), np.nan), "y": np.ones((6, 8))}, "has a NaN or infinite value in sample 0"),
    ],
)
def test_fields_of_ones_own_that_do_not_fit(tmp_path, arrays, message):
    np.savez(tmp_path / "mine.npz", **arrays)
    with pytest.raises(UserError) as caught:
        module.study.build_task(Scale.QUICK, {"data": str(tmp_path / "mine.npz")})
    assert message in str(caught.value)
