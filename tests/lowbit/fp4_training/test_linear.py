"""Three products of four-bit operands: six casts along the right dimensions, honest randomness, a gradient that is the chain rule's."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fewer.lowbit import ELEMENTS, hadamard, qsnr
from fewer.lowbit.fp4_training import FP4Linear, FP4Recipe, fake_quantize_ste, fp4_matmul
from fewer.lowbit.fp4_training.casts import Casts, signs_of, tiled, untiled

PLAIN = FP4Recipe.preset("mxfp4")
EXACT = FP4Recipe(element="fp32")


def nearest(u: float, element: str) -> float:
    """By search in the table of values; ties to the even code."""
    values = ELEMENTS[element].values.double()
    grid = sorted({float(v) for v in values if v >= 0 and v.isfinite()})
    size = min(abs(u), grid[-1])
    distance = min(abs(size - v) for v in grid)
    near = [i for i, v in enumerate(grid) if abs(size - v) == distance]
    chosen = near[0] if len(near) == 1 else next(i for i in near if i % 2 == 0)
    return grid[chosen] if u >= 0 else -grid[chosen]


def searched(x: torch.Tensor, recipe: FP4Recipe, dim: int) -> torch.Tensor:
    """A float64 brute force of a cast: every value by table search, every scale by the rule's definition."""
    import math

    x = x.double().movedim(dim, -1)
    out = torch.empty_like(x)
    scaled = recipe.scale not in ("e8m0", "fp32") and recipe.tensor_scale != "off"
    g = float(x.abs().max()) / (6 * recipe.scale_target) if scaled else 1.0
    for row, made in zip(x.reshape(-1, x.shape[-1]), out.reshape(-1, x.shape[-1]), strict=True):
        for start in range(0, len(row), recipe.block):
            block = row[start : start + recipe.block]
            top = float(block.abs().max())
            if recipe.scale == "e8m0":
                s = 2.0 ** max(-127, math.ceil(math.log2(top / 6))) if top else 1.0
            elif recipe.scale == "fp32":
                s = top / 6
            else:
                s = g * nearest(top / 6 / g, recipe.scale)
            for j, value in enumerate(block):
                made[start + j] = s * nearest(float(value) / s, recipe.element) if s else 0.0
    return out.movedim(-1, dim)


def gradients(x, w, dy, recipe, step=1):
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = fp4_matmul(x, w, recipe, step)
    y.backward(dy)
    return y.detach(), x.grad, w.grad


def operands(m=19, k=34, n=21, dtype=torch.float32):
    return torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype), torch.randn(m, n, dtype=dtype)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("rotations", ["none", "all"])
def test_without_casts_it_is_nn_linear(dtype, close, rotations):
    linear = nn.Linear(48, 32, dtype=dtype)
    ours = FP4Linear.from_linear(copy.deepcopy(linear), EXACT.replace(hadamard=rotations))
    x = torch.randn(64, 48, dtype=dtype, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    dy = torch.randn(64, 32, dtype=dtype)
    (linear(x) * dy).sum().backward()
    y = ours(z)
    (y * dy).sum().backward()
    for a, b in [(linear(x), y), (x.grad, z.grad), (linear.weight.grad, ours.weight.grad), (linear.bias.grad, ours.bias.grad)]:
        assert (a - b).norm() <= (1e-6 if rotations == "none" and dtype == torch.float32 else close) * a.norm()


@pytest.mark.parametrize(
    ("recipe", "close"),
    [
        (PLAIN.replace(block=16), 1e-6),
        (FP4Recipe(scale="fp32", stochastic=frozenset()), 1e-6),
        (FP4Recipe.preset("nvfp4").replace(stochastic=frozenset()), 3e-3),
        (FP4Recipe(scale="ue5m3", block=32, stochastic=frozenset()), 3e-3),
    ],
    ids=["e8m0", "fp32", "e4m3", "ue5m3"],
)
def test_the_six_casts_are_those_of_a_brute_force(recipe, close):
    x, w, dy = operands()
    cast = lambda tensor, dim: searched(tensor, recipe, dim)  # noqa: E731
    expected = cast(x, 1) @ cast(w, 1).T, cast(dy, 1) @ cast(w, 0), cast(dy, 0).T @ cast(x, 0)
    found = gradients(x, w, dy, recipe)
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() <= close * b.norm()
    transposed = cast(dy, 1) @ cast(w, 1)  # Q(W) transposed in place of Q(W^T)
    assert (found[1].double() - transposed).norm() > 1e-2 * transposed.norm()


def test_rotations_turn_both_operands_and_the_exact_product_is_left_as_it_was():
    x, w, dy = operands(64, 64, 32)
    recipe = PLAIN.replace(hadamard="all", hadamard_size=16)
    d = signs_of(recipe, 0)
    turned = [hadamard(x, 16, 1, d), hadamard(w, 16, 1, d)]
    plain = PLAIN.replace(stochastic=frozenset())
    y, dx, dw = gradients(x, w, dy, recipe)
    assert torch.equal(y, fp4_matmul(*turned, plain))
    assert torch.allclose(dx, fp4_matmul(hadamard(dy, 16, 1, d), hadamard(w, 16, 0, d).T.contiguous(), plain), atol=1e-5)
    assert torch.allclose(dw, fp4_matmul(hadamard(dy, 16, 0, d).T.contiguous(), hadamard(x, 16, 0, d).T.contiguous(), plain), atol=1e-5)


@pytest.mark.parametrize("estimator", ["ste", "dge", "spline", "ramp"])
@pytest.mark.parametrize("dim", [0, 1])
def test_euler_the_cast_is_homogeneous_of_degree_one(estimator, dim):
    recipe = FP4Recipe(scale="fp32", estimator=estimator, scale_gradient="absmax")
    x = torch.randn(48, 32, dtype=torch.float64, requires_grad=True)
    g = torch.randn(48, 32, dtype=torch.float64)
    made = fake_quantize_ste(x, recipe, dim)
    (made * g).sum().backward()
    blocks = lambda t: t.detach().movedim(dim, -1).reshape(-1, 16).sum(1)  # noqa: E731
    left, right = blocks(x * x.grad), blocks(g * made)
    scale = (g * made).detach().abs().max()
    # the scales are float32: what the cast rounds there is what is left
    assert (left - right).abs().max() < 1e-5 * scale
    if estimator == "ste":
        assert not torch.allclose(blocks(x * g), right, rtol=1e-3)


def test_euler_holds_to_ten_digits_where_the_scales_are_exact():
    recipe = FP4Recipe(scale="fp32", estimator="spline", scale_gradient="absmax")
    x = torch.randn(64, 16, dtype=torch.float64)
    x = 6 * x / x.abs().amax(1, keepdim=True)  # every scale is 1
    x.requires_grad_()
    g = torch.randn(64, 16, dtype=torch.float64)
    made = fake_quantize_ste(x, recipe)
    (made * g).sum().backward()
    assert ((x * x.grad).sum(1) - (g * made).sum(1)).abs().max() < 1e-10


@pytest.mark.parametrize("scale", ["e8m0", "fp32"])
def test_stochastic_rounding_of_the_gradient_is_unbiased(scale):
    copies, steps = 40, 50  # 2,000 draws: the copies of a row draw apart
    recipe = FP4Recipe(scale=scale, block=16, stochastic=frozenset({"dy"}))
    x, w, dy = torch.randn(33, 24), torch.randn(20, 24), torch.randn(33, 20)
    casts = Casts(recipe.replace(stochastic=frozenset()))
    dxs, dws = [], []
    for step in range(1, steps + 1):
        dxs.append(gradients(x.repeat(copies, 1), w, dy.repeat(copies, 1), recipe, step)[1].view(copies, 33, 24))
        dws.append(gradients(x, w.repeat(copies, 1), dy.repeat(1, copies), recipe, step)[2].view(copies, 20, 24))
    for found, want in (
        (torch.cat(dxs).double(), dy @ casts.cast(w, "w_dgrad", "dgrad", 0)),
        (torch.cat(dws).double(), dy.T @ casts.cast(x, "x_wgrad", "wgrad", 0)),
    ):
        error = found.std(0) / len(found) ** 0.5
        assert ((found.mean(0) - want).abs() <= 5 * error + 1e-5).all()


def test_a_rule_that_saturates_is_biased():
    x, w, dy = torch.randn(33, 24), torch.randn(20, 24), torch.full((33, 20), 7.0)
    recipe = FP4Recipe(scale="e8m0", block=16, scale_rule="floor")
    assert (gradients(x, w, dy, recipe)[1] - gradients(x, w, dy, recipe.replace(scale_rule="rceil"))[1]).abs().max() > 0.5


def test_draws_differ_between_uses_steps_and_layers_and_come_back():
    x, w = torch.eye(32), torch.eye(32)
    dy = torch.rand(32, 32) + 0.1
    recipe = FP4Recipe(scale="fp32", block=32)
    _, dx, dw = gradients(x, w, dy, recipe)
    assert not torch.equal(dx, dw.T)  # Q(dY) and Q(dY^T)^T differ in blocks as well as in draws
    alike = (dy / dy.max() * 6).floor().fill_(2.3)
    alike[0] = alike[:, 0] = 6.0  # every block, along either dimension, has the scale 1
    _, dx, dw = gradients(x, w, alike, recipe)
    assert 0.2 < (dx != dw.T).float().mean() < 0.8  # one draw for both uses would give none
    again = gradients(x, w, alike, recipe)
    assert torch.equal(again[1], dx)
    assert torch.equal(again[2], dw)
    assert not torch.equal(gradients(x, w, alike, recipe, step=2)[1], dx)
    assert not torch.equal(gradients(x, w, alike, recipe.replace(seed=1))[1], dx)
    layers = [FP4Linear.from_linear(nn.Linear(32, 32, bias=False), recipe, layer) for layer in (0, 1)]
    for layer in layers:
        nn.init.eye_(layer.weight)
        layer(x).backward(alike)
    assert not torch.equal(layers[0].weight.grad, layers[1].weight.grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_changes_nothing(reentrant):
    recipe = FP4Recipe.preset("paper").replace(stochastic=frozenset({"dy", "x_wgrad", "w_dgrad"}), tensor_scale=2)
    x = torch.randn(32, 64)
    found = []
    for checked in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
        for i in (0, 2):
            model[i] = FP4Linear.from_linear(model[i], recipe, i)
        for _ in range(3):
            model.zero_grad()
            z = x.clone().requires_grad_()
            y = checkpoint(model, z, use_reentrant=reentrant) if checked else model(z)
            y.square().sum().backward()
        found.append([z.grad, *(p.grad for p in model.parameters()), model[0].steps])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_the_range_of_gradients():
    """dY times 2^-10 is no trouble but for e4m3 without a tensor scale; times 2^-30 ue5m3 is lost too."""
    torch.manual_seed(0)
    x, w, dy = torch.randn(64, 48), torch.randn(32, 48), torch.randn(64, 32)
    dy /= dy.abs().amax()
    for recipe in (FP4Recipe.preset("nvfp4"), FP4Recipe(), PLAIN.replace(stochastic=frozenset())):
        recipe = recipe.replace(stochastic=frozenset())
        base, small = gradients(x, w, dy, recipe), gradients(x, w, dy * 2.0**-10, recipe)
        for a, b in zip(base[1:], small[1:], strict=True):
            assert (a * 2.0**-10 - b).norm() <= 1e-6 * b.norm()
    loss = {}
    for scale in ("e4m3", "ue5m3"):
        recipe = FP4Recipe(scale=scale, tensor_scale="off", stochastic=frozenset())
        cast = lambda t, recipe=recipe: fake_quantize_ste(t, recipe)  # noqa: E731
        loss[scale] = [qsnr(t, cast(t)) for t in (dy, dy * 2.0**-10, dy * 2.0**-30)]
    assert loss["e4m3"][0] - loss["e4m3"][1] > 10
    assert loss["ue5m3"][0] - loss["ue5m3"][1] < 1
    assert loss["ue5m3"][0] - loss["ue5m3"][2] > 10


def test_a_held_maximum_is_measured_every_d_th_step():
    recipe = FP4Recipe(tensor_scale=4, stochastic=frozenset())
    layer = FP4Linear.from_linear(nn.Linear(32, 16, bias=False), recipe)
    tops = []
    for step in range(1, 10):
        layer(torch.full((16, 32), float(step)))
        tops.append(float(layer._held["x forward"]))
    assert tops == [1.0] * 4 + [5.0] * 4 + [9.0]
    assert "_held" not in " ".join(layer.state_dict())
    grown = torch.randn(16, 32)
    for scale, saturates in (("ue5m3", False), ("e4m3", True)):
        layer = FP4Linear.from_linear(nn.Linear(32, 32, bias=False), recipe.replace(scale=scale))
        nn.init.eye_(layer.weight)
        layer(grown)
        lost = qsnr(100 * grown, layer(100 * grown)) < qsnr(grown, layer(grown)) - 6
        assert lost == saturates


def test_tiles_transpose_and_rows_do_not():
    w = torch.randn(40, 70)
    assert torch.equal(untiled(tiled(w, 16), (40, 70)), w)
    for blocks, same in (("2d", True), ("1d", False)):
        for recipe in (FP4Recipe(weight_blocks=blocks), PLAIN.replace(weight_blocks=blocks, block=16)):
            casts = Casts(recipe)
            one, other = casts.cast(w, "w", "forward", 1), casts.cast(w.T.contiguous(), "w", "forward", 1)
            assert torch.equal(one.T, other) == same
            assert torch.equal(one, casts.cast(w, "w_dgrad", "dgrad", 0)) == same


@pytest.mark.parametrize("packed", [True, False])
def test_packing_what_is_kept_changes_no_bit(packed):
    x, w, dy = operands()
    for recipe in (
        FP4Recipe.preset("nvfp4"),
        FP4Recipe.preset("paper"),
        PLAIN,
        FP4Recipe(scale="fp32"),
        FP4Recipe(element="int8", scale="bf16"),
    ):
        found = [gradients(x, w, dy, recipe.replace(pack_saved=each)) for each in (True, packed)]
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_outliers_are_multiplied_apart():
    x, w, dy = operands()
    x[3, 4], x[10, 20] = 300.0, -500.0
    plain = FP4Recipe.preset("nvfp4")
    exact = x @ w.T, dy @ w, dy.T @ x
    clamped, whole = gradients(x, w, dy, plain.replace(clamp=0.99)), gradients(x, w, dy, plain)
    for found, other, want in list(zip(clamped, whole, exact, strict=True))[::2]:
        assert (found - want).norm() < 0.5 * (other - want).norm()
    assert torch.equal(clamped[1], whole[1])


def test_a_loss_scale_is_taken_back():
    x, w, dy = operands()
    off = FP4Recipe(scale="e4m3", tensor_scale="off", stochastic=frozenset())
    small = dy * 2.0**-12
    lost, kept = gradients(x, w, small, off), gradients(x, w, small, off.replace(loss_scale=2.0**12))
    exact = dy @ w * 2.0**-12
    assert (kept[1] - exact).norm() < 0.3 * exact.norm() < (lost[1] - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_rows_and_strides(dtype):
    torch.manual_seed(0)
    linear = nn.Linear(48, 32)
    ours = FP4Linear.from_linear(copy.deepcopy(linear), FP4Recipe.preset("nvfp4").replace(stochastic=frozenset()))
    x = torch.randn(6, 5, 48)
    want = ours(x)
    found = ours.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    assert (found.float() - want).norm() < 0.15 * want.norm()
    found.float().sum().backward()
    assert ours.weight.grad.dtype == dtype
    ours.float()
    assert torch.equal(ours(x.transpose(0, 1)), ours(x.transpose(0, 1).contiguous()))
    assert ours(x[0, 0]).shape == (32,)
    assert ours(x[:0]).shape == (0, 5, 32)


def test_autocast_does_not_round_first():
    ours = FP4Linear.from_linear(nn.Linear(48, 32), FP4Recipe.preset("nvfp4"))
    x = torch.randn(16, 48)
    want = ours.eval()(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), want)


def test_a_layer_is_copied_pickled_and_saved():
    recipe = FP4Recipe.preset("paper")
    ours = FP4Linear(64, 32, recipe=recipe, layer=3)
    ours(torch.randn(32, 64)).sum().backward()
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        x = torch.randn(32, 64)
        assert torch.equal(other(x), ours(x))
        assert other.recipe == recipe
    assert set(ours.state_dict()) == {"weight", "bias", "hadamard_signs"}
    fresh = FP4Linear(64, 32, recipe=recipe.replace(seed=9))
    fresh.load_state_dict(ours.state_dict())
    assert torch.equal(fresh.hadamard_signs, ours.hadamard_signs)
    fresh.load_state_dict(nn.Linear(64, 32).state_dict())


def test_evaluation_is_in_four_bits_and_no_step():
    ours = FP4Linear(64, 32, recipe=FP4Recipe.preset("nvfp4")).eval()
    x = torch.randn(8, 64)
    assert not torch.allclose(ours(x), nn.functional.linear(x, ours.weight, ours.bias), atol=1e-3)
    assert ours.steps == 0


def test_a_layer_that_is_used_twice_gives_each_use_its_own_gradient():
    recipe = FP4Recipe.preset("nvfp4").replace(stochastic=frozenset(), estimator="dge", scale_gradient="absmax")
    layer = FP4Linear.from_linear(nn.Linear(32, 32, bias=False), recipe)
    x, dy = torch.randn(16, 32, requires_grad=True), torch.randn(16, 32)
    (alone,) = torch.autograd.grad(layer(x), x, dy)
    y = layer(x)
    layer(100 * torch.randn(16, 32))  # its maximum is another
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], alone)


def test_what_is_evaluated_leaves_no_trace_in_the_held_maxima():
    layer = FP4Linear(32, 32, recipe=FP4Recipe.preset("follow-up"))
    x = torch.randn(32, 32)
    layer(x)
    held = dict(layer._held)
    layer.eval()(100 * x)
    assert layer._held == held


def test_a_backward_pass_inside_autocast_is_the_same():
    layer = FP4Linear(32, 32, recipe=FP4Recipe.preset("nvfp4").replace(stochastic=frozenset()))
    x = torch.randn(16, 32)
    (outside,) = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    with torch.autocast("cpu", torch.bfloat16):
        (inside,) = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    assert torch.equal(inside, outside)


@pytest.mark.parametrize("shape", [(0, 32), (1, 32), (3, 0)])
@pytest.mark.parametrize("words", [{"estimator": "dge"}, {"scale_gradient": "softmax", "hadamard": "all"}, {"clamp": 0.9}])
def test_no_row_one_row_and_no_column(shape, words):
    x, w = torch.randn(shape, requires_grad=True), torch.randn(20, shape[1], requires_grad=True)
    y = fp4_matmul(x, w, FP4Recipe(**words))
    y.sum().backward()
    assert y.shape == (shape[0], 20)
    assert x.grad.shape == x.shape
    assert w.grad.isfinite().all()
