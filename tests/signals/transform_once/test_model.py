"""T1 against what it must equal: transforms after the lift, layers on whole fields, four loops, cosine series."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fewer.signals import FNO, T1, T1UNet, idct, select_modes, truncated_dct, vp_std
from fewer.signals.transform_once.model import T1Layer, constant_modes
from fewer.signals.transform_once.transforms import basis_matrix

near = {"rtol": 1e-12, "atol": 1e-12}


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def made(n_modes, resolution, c_in=1, c_out=1, **words):
    torch.manual_seed(0)
    model = T1(n_modes, 6, c_in, c_out, words.pop("n_layers", 2), resolution=resolution, head_scale=0.3, **words).double()
    torch.nn.init.normal_(model.lift.bias)
    return model


@pytest.mark.parametrize("basis", ["dct", "fourier"])
@pytest.mark.parametrize(("n_modes", "resolution"), [((5,), (11,)), ((5, 4), (12, 20)), ((3, 2, 4), (6, 5, 8))])
def test_lifting_modes_is_transforming_lifted_fields(n_modes, resolution, basis):
    model, x = made(n_modes, resolution, 3, basis=basis), draw(2, 3, *resolution)
    grids = torch.meshgrid(*(torch.linspace(0, 1, n, dtype=torch.float64) for n in resolution), indexing="ij")
    whole = torch.cat([x, torch.stack(grids).expand(2, -1, *resolution)], 1)
    lifted = F.linear(whole.movedim(1, -1), model.lift.weight, model.lift.bias).movedim(-1, 1)
    wanted = truncated_dct(lifted, n_modes, basis)
    torch.testing.assert_close(model._lifted(model.to_modes(x)).movedim((-2, -1), (0, 1)), wanted, **near)


def by_loops(layer, z):
    """The layer of the page on z [B, D, m1, m2], in four loops."""
    w, (a, b) = layer.channel_mixing, layer.axis_mixing
    _, width, m1, m2 = z.shape
    t = torch.zeros_like(z)
    for x in range(m1):
        for y in range(m2):
            for o in range(width):
                for i in range(width):
                    t[:, o, x, y] += z[:, i, x, y] * w[x, y, i, o]
    t = F.gelu(t) if layer.activation == "gelu" else torch.sin(t)
    first, second = torch.zeros_like(z), torch.zeros_like(z)
    for c in range(width):
        for new in range(m1):
            for x in range(m1):
                first[:, c, new] += t[:, c, x] * a[c, x, new]
        for new in range(m2):
            for y in range(m2):
                second[:, c, :, new] += first[:, c, :, y] * b[c, y, new]
    return z + second


@pytest.mark.parametrize("activation", ["gelu", "sin"])
@torch.no_grad()
def test_a_layer_is_its_loops_and_without_weights_the_identity(activation):
    layer, z = T1Layer((3, 4), 5, activation).double(), draw(2, 5, 3, 4)
    inside = z.movedim((0, 1), (-2, -1))
    torch.testing.assert_close(layer(inside).movedim((-2, -1), (0, 1)), by_loops(layer, z), **near)
    for weights in (layer.channel_mixing, *layer.axis_mixing):
        still = copy.deepcopy(layer)
        for one, other in zip(layer.parameters(), still.parameters(), strict=True):
            if one is weights:
                other.zero_()
        assert torch.equal(still(inside), inside)


@pytest.mark.parametrize("basis", ["dct", "fourier"])
@torch.no_grad()
def test_the_block_is_the_whole_field_with_zeros_outside(basis):
    model, x = made((4, 3), (7, 9), 2, 3, basis=basis), draw(2, 2, 7, 9)
    wide = draw(2, 6, 7, 9) * 0
    wide[..., :4, :3] = model._lifted(model.to_modes(x)).movedim((-2, -1), (0, 1))
    for layer in model.layers:
        w = torch.zeros(7, 9, 6, 6, dtype=torch.float64)
        w[:4, :3] = layer.channel_mixing
        a, b = torch.zeros(6, 7, 7, dtype=torch.float64), torch.zeros(6, 9, 9, dtype=torch.float64)
        a[:, :4, :4], b[:, :3, :3] = layer.axis_mixing
        t = F.gelu(torch.einsum("bixy,xyio->boxy", wide, w))
        wide = wide + torch.einsum("bcxy,cxu,cyv->bcuv", t, a, b)
    spectrum = torch.einsum("bcxy,cd,do->boxy", wide, torch.zeros(6, 6).double() + torch.eye(6), torch.eye(6).double())
    spectrum = torch.sin(spectrum.movedim(1, -1) @ model.head_in) @ model.head_out
    matrices = [basis_matrix(basis, n, n, n) for n in (7, 9)]
    field = torch.einsum("bxyo,xi,yj->boij", spectrum, *matrices)
    torch.testing.assert_close(model(x), field, **near)


def test_other_resolutions_are_the_cosine_series_at_their_points():
    model, z = made((4, 5), (8, 10)), draw(2, 1, 4, 5)
    at = [(2 * torch.arange(2 * n, dtype=torch.float64) + 1) / (4 * n) for n in (8, 10)]
    series = torch.zeros(2, 1, 16, 20, dtype=torch.float64)
    for p in range(4):
        for q in range(5):
            scale = math.sqrt((1 if p == 0 else 2) / 8 * (1 if q == 0 else 2) / 10)
            series += z[:, :, p, q, None, None] * scale * (torch.cos(math.pi * p * at[0])[:, None] * torch.cos(math.pi * q * at[1]))
    torch.testing.assert_close(model.from_modes(z, (16, 20)), series, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.from_modes(z), idct(F.pad(z, (0, 5, 0, 4)), (2, 3)), **near)
    periodic = made((8,), (8,), basis="fourier")  # all modes, the fastest cosine too
    waves = periodic.to_modes(x := draw(1, 1, 8))
    torch.testing.assert_close(periodic.from_modes(waves, (16,))[..., ::2], x, **near)


@torch.no_grad()
def test_swapping_axes_swaps_the_answer():
    model, x = made((3, 5), (12, 20), 3, 2), draw(2, 3, 12, 20)
    swapped = made((5, 3), (20, 12), 3, 2)
    swapped.load_state_dict(
        {
            name: value
            if name.startswith(("lift.bias", "head", "basis"))
            else value[:, [0, 1, 2, 4, 3]]
            if name == "lift.weight"
            else value.transpose(0, 1)
            if "channel" in name
            else model.state_dict()[name[:-1] + str(1 - int(name[-1]))]
            for name, value in model.state_dict().items()
        }
    )
    torch.testing.assert_close(swapped(x.transpose(2, 3)), model(x).transpose(2, 3), **near)


def test_operations_on_modes_do_not_see_the_resolution():
    found = []
    for n in (16, 64):
        model = T1((8, 8), 4, resolution=(n, n))
        z = model.to_modes(torch.randn(2, 1, n, n))
        with FlopCounterMode(display=False) as flops:
            model.forward_modes(z).square().mean().backward()
        found.append(flops.get_total_flops())
    assert found[0] == found[1] > 0


@torch.no_grad()
def test_listed_modes_stay_alone():
    x = draw(20, 1, 8, 8)
    model = made((1, 1), (8, 8), modes=select_modes(x, top_k=5))
    z = model.forward_modes(model.to_modes(x[:3]))
    assert (z != 0).sum() == 3 * 5
    assert (z[:, 0] != 0)[0].nonzero().tolist() == [list(each) for each in select_modes(x, top_k=5).index]


def test_a_model_that_answered_first_can_still_be_trained():
    """What it keeps of its bases must not be bound to inference."""
    basis_matrix.cache_clear()
    constant_modes.cache_clear()
    model, x = T1((3, 2), 4, resolution=(7, 5)), torch.randn(2, 1, 7, 5)
    with torch.inference_mode():
        model(x)
    (model(x) - x).square().mean().backward()
    assert all(each.grad is not None for each in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_is_near(dtype):
    torch.manual_seed(0)
    for model in (T1((6, 6), 8, resolution=(32, 32), head_scale=0.3), FNO((6, 6), 8)):
        x = torch.randn(4, 1, 32, 32)
        exact, found = model(x), copy.deepcopy(model).to(dtype)(x.to(dtype))
        assert found.dtype == dtype
        assert (found.float() - exact).norm() <= 20 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_go_out_and_come_back(tmp_path, dtype):
    for i, model in enumerate((T1((4,), 6, resolution=(9,), basis="fourier"), T1UNet((4, 6), 5, 2, resolution=(9, 9), exponent=2))):
        model = model.to(dtype)
        model.save_pretrained(tmp_path / str(i))
        again = type(model).from_pretrained(tmp_path / str(i))
        x = torch.randn(2, model.in_channels, *model.resolution).to(dtype)
        assert torch.equal(again(x), model(x))
        assert torch.equal(copy.deepcopy(model)(x), model(x))
    for name, value in T1((4,), 6, resolution=(9,)).state_dict().items():
        assert value.isfinite().all(), name


def test_the_u_net_takes_blocks_of_any_size_and_any_number_of_axes():
    for n_modes, resolution in (((5,), (9,)), ((5, 6), (9, 8)), ((3, 4, 5), (6, 6, 6))):
        model = T1UNet(n_modes, 4, resolution=resolution, exponent=2)
        y = model(torch.randn(2, 1, *resolution))
        y.square().sum().backward()
        assert y.shape == (2, 1, *resolution)
        assert all(each.grad is not None and each.grad.isfinite().all() for each in model.parameters())


# Variance


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_cutting_and_mixing_keeps_the_total_variance(kind):
    n, m, samples = 1000, 100, 4096
    x = torch.randn(samples, m)  # the modes kept of white noise, in any orthonormal basis
    std = vp_std(n, m, kind=kind)
    if kind == "diagonal":
        y = x * std * torch.randn(samples, m)
    else:
        y = torch.cat([torch.bmm(part[:, None], std * torch.randn(len(part), m, m))[:, 0] for part in x.split(256)])
    assert y.square().sum(1).mean().item() / n == pytest.approx(1, rel=0.03)


def test_with_channels_too_and_the_naive_start_loses_it():
    draws = {init: [] for init in ("vp-first", "naive")}
    for init, found in draws.items():
        for seed in range(12):
            torch.manual_seed(seed)
            model = T1((8, 8), 8, 8, resolution=(32, 32), init=init, n_layers=1)
            z = model.to_modes(torch.randn(64, 8, 32, 32))
            weights = model.layers[0].channel_mixing
            mixed = torch.einsum("bixy,xyio->boxy", z, weights)
            found.append(mixed.square().sum((1, 2, 3)).mean().item() / (8 * 32 * 32))
    assert sum(draws["vp-first"]) / 12 == pytest.approx(1, rel=0.05)
    assert max(draws["naive"]) < 0.01


@torch.no_grad()
def test_making_up_in_every_layer_multiplies_variance():
    ratios = []
    for seed in range(20):
        energies = {}
        for init in ("vp-first", "vp-all"):
            torch.manual_seed(seed)
            model = T1((6, 6), 8, resolution=(16, 16), init=init)
            z = torch.randn(36, 32, 8, generator=torch.Generator().manual_seed(seed))
            for layer in model.layers:  # linear, without residual
                z = torch.bmm(z, layer.channel_mixing.flatten(0, 1))
            energies[init] = z.square().mean().item()
        ratios.append(energies["vp-all"] / energies["vp-first"])
    assert sum(ratios) / 20 == pytest.approx((16 * 16 / 36) ** 3, rel=0.2)


def test_released_complex_form():
    assert vp_std(64, 24, 48, transform="rfft") == pytest.approx(math.sqrt(64 / (2 * 24 * 48)))
