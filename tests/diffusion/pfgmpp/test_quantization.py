"""Weights on grids: values of a grid come back, the error is bounded, and what is skipped stays."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fewer.diffusion.pfgmpp import quantize_weights
from fewer.diffusion.pfgmpp.quantization import affine_grid, to_grid
from fewer.tasks.digit_denoiser import DenoiserRecipe, DigitDenoiser


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.floats(1e-3, 10), st.integers(0, 511))
def test_values_of_a_grid_come_back_exactly(bits, scale, zero):
    zero = float(min(zero, 2**bits - 1))
    grid = scale * (torch.arange(2**bits, dtype=torch.float64) - zero)
    assert torch.equal(to_grid(grid, scale, zero, bits), grid)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(0, 10_000))
def test_the_error_is_half_a_scale_inside_the_grid_and_a_scale_at_the_minimum(bits, seed):
    w = torch.randn(50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scale, zero = affine_grid(w, bits)
    assert scale == pytest.approx(float(w.max() - w.min()) / (2**bits - 1))
    assert zero == int(zero)
    error = (to_grid(w, scale, zero, bits) - w).abs()
    inside = (w >= -scale * zero) & (w <= scale * (2**bits - 1 - zero))
    assert (error[inside] <= scale / 2 * (1 + 1e-9)).all()
    assert (error <= scale * (1 + 1e-9)).all()
    assert len(to_grid(w, scale, zero, bits).unique()) <= 2**bits


def test_the_published_formula_is_followed_where_it_clips_and_where_weights_are_constant():
    scale, zero = affine_grid(torch.tensor([3.0, 4.0, 5.0]), 2)
    assert (scale, zero) == (pytest.approx(2 / 3), 0.0)
    assert torch.allclose(to_grid(torch.tensor([3.0, 4.0, 5.0]), scale, zero, 2), torch.full((3,), 2.0))
    assert affine_grid(torch.tensor([-5.0, -3.0]), 2) == (pytest.approx(2 / 3), 3.0)
    assert affine_grid(torch.tensor([-1.75, 1.25], dtype=torch.float64), 2) == (1.0, 1.0), "zero is truncated, not rounded"
    layer = nn.Linear(2, 3)
    nn.init.constant_(layer.weight, 0.7)
    assert torch.equal(quantize_weights(layer, 4).weight, layer.weight)


def test_norms_the_noise_embedding_biases_and_the_given_module_stay():
    model = DigitDenoiser(DenoiserRecipe(side=4, width=16))
    for part in model.parameters():
        nn.init.normal_(part)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = quantize_weights(model, 3)
    changed = {name for name, value in made.state_dict().items() if not torch.equal(value, before[name])}
    blocks = {f"blocks.{i}.{part}.weight" for i in range(3) for part in ("first", "condition", "last")}
    assert changed == {"enter.weight", "leave.weight"} | blocks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(len(made.get_parameter(name).unique()) <= 8 for name in changed)
    wrapped = nn.ModuleDict({"denoiser": model})  # whose name has "noise" in it
    assert torch.equal(quantize_weights(wrapped, 3)["denoiser"].enter.weight, made.enter.weight)
    assert "noise.0.weight" in {name for name, value in quantize_weights(model, 3, skip=()).named_parameters() if len(value.unique()) <= 8}


def test_what_is_skipped_may_be_several_words():
    model = nn.ModuleDict({"time_embedding": nn.Linear(3, 3), "time_emb_proj": nn.Linear(3, 3), "conv_in": nn.Conv2d(1, 3, 3)})

    def on_a_grid(skip):
        made = quantize_weights(model, 1, skip)
        return {name for name, value in made.named_parameters() if value.ndim > 1 and len(value.unique()) <= 2}

    assert on_a_grid(("norm",)) == {f"{name}.weight" for name in model}
    assert on_a_grid(("Time_Embedding",)) == {"time_emb_proj.weight", "conv_in.weight"}
    assert on_a_grid(("time",)) == {"conv_in.weight"}
    assert on_a_grid(("conv_in.weight", "emb")) == {"time_embedding.weight"}
    with pytest.raises(ValueError, match="skip is 'norm'; expected several strings"):
        quantize_weights(model, 4, "norm")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype_and_a_tied_weight_keep_what_they_are(dtype):
    first, second = nn.Linear(4, 4, dtype=dtype), nn.Linear(4, 4, dtype=dtype)
    second.weight = first.weight
    made = quantize_weights(nn.Sequential(first, second), 4)
    assert made[0].weight is made[1].weight
    assert made[0].weight.dtype == dtype
    assert made[0].weight.requires_grad
    assert float((made[0].weight - first.weight).detach().abs().max()) < 0.1


@pytest.mark.parametrize("bits", [0, -1, 17, 4.0, True])
def test_bits_that_cannot_be_are_refused(bits):
    with pytest.raises(ValueError, match="bits is"):
        quantize_weights(nn.Linear(2, 2), bits)


def test_weights_that_are_not_finite_are_refused():
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.weight, float("nan"))
    with pytest.raises(ValueError, match="weight is not finite; expected trained weights"):
        quantize_weights(layer, 4)
    with pytest.raises(ValueError, match="no weight of LayerNorm is put on a grid"):
        quantize_weights(nn.LayerNorm(3), 4)
