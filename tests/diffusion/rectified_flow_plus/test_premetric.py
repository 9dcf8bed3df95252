"""What a velocity is judged by, held against formulas written by hand."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from flows import Exact, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from fewer.diffusion.rectified_flow_plus import (
    FeatureDistance,
    LPIPSHuber,
    PseudoHuber,
    PyramidHuber,
    SquaredL2,
    TeacherFeatures,
    VelocityFromEDM,
    classifier_distance,
    lpips_distance,
)
from fewer.diffusion.rectified_flow_plus.premetric import VGG16

IDENTITY = nn.Sequential(nn.Identity()).eval()
SHAPE = (2, 4, 4)
D = 32


def convolution(dtype=torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh()).to(dtype).eval().requires_grad_(False)


def draws(count=5):
    return randn(count, *SHAPE), randn(count, *SHAPE, seed=1), torch.linspace(0.1, 0.9, count, dtype=torch.float64)


def premetrics():
    features = FeatureDistance(convolution(), ["0", "1"])
    return [SquaredL2(), PseudoHuber(), *(LPIPSHuber(each, time_weight=w) for each in (features, PyramidHuber()) for w in ("none", "1/t"))]


def test_a_premetric_is_zero_only_where_the_velocities_are_equal():
    x, z, t = draws()
    for premetric in premetrics():
        there = premetric(z - x, x, z, t)
        assert there.shape == (5,)
        assert there.abs().max() < 1e-12, premetric.name
        assert (premetric(z - x + 0.01 * randn(5, *SHAPE, seed=2), x, z, t) > 1e-9).all(), premetric.name


@settings(max_examples=20, deadline=None)
@given(st.floats(1e-3, 1e3), st.integers(0, 100))
def test_hubers_gradient_is_at_most_one_over_d_long(c, seed):
    x, z, t = draws()
    v = (10 * randn(5, *SHAPE, seed=seed)).requires_grad_()
    PseudoHuber(c)(v, x, z, t).sum().backward()
    assert v.grad.flatten(1).norm(dim=1).max() <= 1 / D + 1e-12


def test_huber_is_the_length_for_small_c_and_the_square_for_large_c():
    x, z, t = draws()
    v = randn(5, *SHAPE, seed=2)
    e = (v - (z - x)).flatten(1).square().sum(1)
    assert torch.allclose(PseudoHuber(1e-9)(v, x, z, t), e.sqrt() / D)
    c = 1e6
    assert torch.allclose(PseudoHuber(c)(v, x, z, t), e / (2 * c * D), rtol=1e-6)
    assert torch.allclose(PseudoHuber()(v, x, z, t), ((e + (0.00054 * D) ** 2).sqrt() - 0.00054 * D) / D), "the released code's c"
    assert torch.allclose(SquaredL2()(v, x, z, t), e / D)


def test_configurations_e_and_f_are_huber_and_features_of_the_reached_image():
    x, z, t = draws()
    v, features = randn(5, *SHAPE, seed=2), FeatureDistance(convolution(), ["1"])
    column = t.reshape(-1, 1, 1, 1)
    reached = (1 - column) * x + column * z - column * v
    huber, distance = PseudoHuber()(v, x, z, t), features(reached, x)
    assert torch.allclose(LPIPSHuber(features)(v, x, z, t), (1 - t) * huber + distance)
    assert torch.allclose(LPIPSHuber(features, time_weight="1/t")(v, x, z, t), (1 - t) * huber + distance / t)


def test_configuration_f_at_t_1_is_the_features_alone():
    x, z, _ = draws()
    v, features, t = randn(5, *SHAPE, seed=2), FeatureDistance(convolution(), ["1"]), torch.ones(5, dtype=torch.float64)
    assert torch.equal(LPIPSHuber(features, time_weight="1/t")(v, x, z, t), features(z - v, x))


@pytest.mark.parametrize("weight", [None, [0.5, 2.0]])
def test_the_distance_over_an_identity_is_the_formula(weight):
    a, b = randn(3, *SHAPE), randn(3, *SHAPE, seed=1)
    unit_a, unit_b = (each / (each.square().sum(1, keepdim=True) + 1e-10).sqrt() for each in (a, b))
    square = (unit_a - unit_b).square()
    wanted = (square * torch.tensor(weight or [1.0, 1.0]).double().reshape(1, 2, 1, 1)).sum(1).mean((1, 2))
    distance = FeatureDistance(IDENTITY, ["0"], weight and [torch.tensor(weight).double()])
    assert torch.allclose(distance(a, b), wanted, atol=1e-14)
    assert torch.equal(distance(a, a), torch.zeros(3).double())
    zero = torch.zeros(1, *SHAPE, dtype=torch.float64, requires_grad=True)
    distance(zero, b[:1]).sum().backward()
    assert zero.grad.isfinite().all(), "1e-10 is inside the root"


def test_gradients_reach_the_first_image_alone():
    a, b = randn(2, *SHAPE).requires_grad_(), randn(2, *SHAPE, seed=1).requires_grad_()
    net = convolution()
    distance = FeatureDistance(net, ["0", "1"])
    assert torch.autograd.gradcheck(lambda x: distance(x, b), (a,), atol=1e-6)
    distance(a, b).sum().backward()
    assert b.grad is None
    assert all(weight.grad is None for weight in net.parameters())


def test_the_features_stay_in_eval_mode_and_can_be_copied_and_saved():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Dropout(0.5)).double().eval().requires_grad_(False)
    assert not FeatureDistance(net, ["1"]).train().training
    premetric = LPIPSHuber(FeatureDistance(net, ["1"])).train()
    assert not net.training
    a, b = randn(2, *SHAPE), randn(2, *SHAPE, seed=1)
    for twin in (copy.deepcopy(premetric), pickle.loads(pickle.dumps(premetric))):
        assert torch.equal(twin.distance(a, b), premetric.distance(a, b))
        twin.load_state_dict(premetric.state_dict())
    assert not net._forward_hooks
    assert not net[1]._forward_hooks


def test_types_strides_and_a_batch_of_one():
    a, b = randn(4, *SHAPE), randn(4, *SHAPE, seed=1)
    for make, dtype, tolerance in (
        (lambda: FeatureDistance(convolution(torch.float32), ["1"]), torch.float32, 1e-5),
        (PyramidHuber, torch.float32, 1e-5),
        (lambda: FeatureDistance(convolution(torch.float32), ["1"]), torch.float16, 5e-3),
        (lambda: FeatureDistance(convolution(torch.bfloat16), ["1"]), torch.bfloat16, 5e-2),
        (PyramidHuber, torch.bfloat16, 5e-2),
    ):
        distance = make()
        exact = (FeatureDistance(convolution(), ["1"]) if isinstance(distance, FeatureDistance) else distance)(a, b)
        found = distance(a.to(dtype), b.to(dtype))
        assert found.dtype == torch.float32
        assert torch.allclose(found.double(), exact, rtol=5e-2 if tolerance > 1e-3 else 1e-4, atol=tolerance)
    distance = FeatureDistance(convolution(), ["1"])
    assert torch.allclose(distance(a[:1], b[:1]), distance(a, b)[:1])
    assert torch.allclose(distance(a.transpose(2, 3), b), distance(a.transpose(2, 3).contiguous(), b))


def test_the_pyramid_weighs_coarse_and_fine_and_is_zero_only_at_equality():
    distance, a = PyramidHuber(), torch.zeros(1, 1, 8, 8)
    checks = (torch.arange(8)[:, None] + torch.arange(8)).remainder(2).float().mul(2).sub(1)[None, None]
    assert float(distance(a, a)) == 0
    assert float(distance(a, a + 0.1 * checks)) > 0
    assert float(distance(a, a + 0.1)) > 0
    assert PyramidHuber(levels=5)(torch.zeros(2, 3, 5, 7), torch.ones(2, 3, 5, 7)).shape == (2,)


def test_objects_of_other_libraries_are_called_as_they_are():
    class Theirs(nn.Module):  # as lpips.LPIPS: one number a sample, [B, 1, 1, 1]
        def forward(self, a, b):
            return (a - b).square().mean((1, 2, 3), keepdim=True)

    x, z, t = draws()
    v = randn(5, *SHAPE, seed=2)
    theirs = LPIPSHuber(Theirs().eval())(v, x, z, t)
    assert theirs.shape == (5,)

    class Piqs(Theirs):  # as piq.LPIPS, of images in [0, 1]
        __module__ = "piq.perceptual"

        def forward(self, a, b):
            return super().forward(2 * a - 1, 2 * b - 1)

    assert torch.allclose(LPIPSHuber(Piqs().eval())(v, x, z, t), theirs)

    class Mean(nn.Module):  # as piq's by default
        def forward(self, a, b):
            return (a - b).square().mean()

    with pytest.raises(ValueError, match='a number a sample: reduction="none"'):
        LPIPSHuber(Mean().eval())(v, x, z, t)


def test_a_classifier_trained_on_the_spot_and_a_teachers_own_features():
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    labels = (images.mean((1, 2, 3)) > 0).long()
    distance = classifier_distance(images, labels, steps=3, batch_size=8)
    assert [each.shape[1:] for each in distance.features(images[:2])] == [(8, 8, 8), (16, 4, 4), (16, 4, 4)]
    assert "classifier" in LPIPSHuber(distance).name
    again = classifier_distance(images, labels.int(), steps=3, batch_size=8)
    assert torch.equal(again(images[:2], images[2:4]), distance(images[:2], images[2:4]))
    asked = []

    class Noted(Exact):
        def forward(self, x, sigma):
            asked.append(float(sigma))
            return super().forward(x, sigma)

    features = TeacherFeatures(VelocityFromEDM(Noted(0.5)).eval(), sigma=0.25)
    assert FeatureDistance(features, ["velocity.denoiser"])(images[:2], images[2:4]).shape == (2,)
    assert asked == pytest.approx([0.25, 0.25])


def test_lpips_from_local_weights_pools_by_means_and_sees_imagenets_pixels(tmp_path):
    torch.manual_seed(0)
    parts, channels, place = {}, 3, 0
    for out in VGG16:
        if out:
            parts |= {f"features.{place}.weight": 0.05 * torch.randn(out, channels, 3, 3), f"features.{place}.bias": torch.zeros(out)}
        place, channels = place + (2 if out else 1), out or channels
    assert place == 30, "torchvision's places"
    save_file(parts, tmp_path / "vgg.safetensors")
    save_file(
        {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}, tmp_path / "heads.safetensors"
    )
    distance = lpips_distance(tmp_path / "vgg.safetensors", tmp_path / "heads.safetensors")
    distance.resize = 32  # quicker than 224
    a, b = (torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in (0, 1))
    assert float(distance(a, a)) == 0
    assert float(distance(a, b)) > 0
    assert not [part for part in distance.modules() if isinstance(part, nn.MaxPool2d)]
    seen = distance.backbone[0](a)
    mean, deviation = (torch.tensor(each).reshape(1, 3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert torch.allclose(seen, ((a + 1) / 2 - mean) / deviation, atol=1e-6)
    assert [each.shape[1] for each in distance.features(a)] == [64, 128, 256, 512, 512]
    with pytest.raises(FileNotFoundError, match="classifier_distance"):
        lpips_distance(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="other weights than VGG16's"):
        lpips_distance(tmp_path / "heads.safetensors")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FeatureDistance(nn.Sequential(nn.Conv2d(1, 1, 1)).eval(), ["0"]), "trainable parameters"),
        (lambda: LPIPSHuber(nn.Sequential(nn.Identity())), "train mode"),
        (lambda: FeatureDistance(IDENTITY, ["7"]), "expected parts of the backbone: 0"),
        (lambda: FeatureDistance(IDENTITY, ["0"], [torch.tensor([-1.0])]), "without negative"),
        (lambda: FeatureDistance(IDENTITY, ["0"], []), "0 weights for 1 layers"),
        (lambda: FeatureDistance(IDENTITY, ["0"], [torch.tensor([float("nan")])]), "without negative"),
        (lambda: FeatureDistance(IDENTITY, ["0"], [torch.ones(3)])(*draws()[:2]), "2 channels and 3 weights"),
        (lambda: PyramidHuber()(torch.zeros(2, 4), torch.zeros(2, 4)), "expected images"),
        (lambda: classifier_distance(torch.zeros(4, 1, 8, 8), torch.arange(3)), "labels are .3,. torch.int64; expected whole"),
        (lambda: classifier_distance(torch.zeros(4, 1, 8, 8), torch.tensor([-1, 0, 1, 1])), "expected whole numbers from 0"),
        (lambda: LPIPSHuber(IDENTITY, time_weight="t"), "time_weight is 't'"),
        (lambda: PseudoHuber(0.0), "huber_c is 0"),
        (lambda: PyramidHuber()(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.uint8)), "b is .* scale bytes"),
        (lambda: FeatureDistance(IDENTITY, ["0"])(torch.zeros(1, 1, 4, 4).byte(), torch.zeros(1, 1, 4, 4)), "a is .* scale bytes"),
        (lambda: classifier_distance(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4).long()), "scale bytes"),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
