"""The formulas against the paper's crossovers and against sampling; the casts against the area's formats and against plain arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fewer.lowbit import FORMATS, BlockFormat, crest_factor, fake_quantize, hadamard, qsnr
from fewer.lowbit._shared.blocks import prepare
from fewer.lowbit._shared.formats import Rule
from fewer.lowbit.int_vs_fp import ALL, PAIRS, Quantiser, analyse_tensor, crossover, hardware_cost, mean_crest, qsnr_theory
from fewer.lowbit.int_vs_fp.problems import BIASED, UNBIASED, signed_error
from fewer.lowbit.int_vs_fp.theory import compared


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_crossovers_are_the_papers():
    assert [crossover(pair) for pair in PAIRS] == pytest.approx([7.546, 1.959, 2.042, 2.390], abs=0.002)
    assert crossover("nv4", rho=1.0) == pytest.approx(2.463, abs=0.001)
    for pair, (integer, floating) in PAIRS.items():
        below, above = crossover(pair) * 0.99, crossover(pair) * 1.01
        assert qsnr_theory(integer, below) > qsnr_theory(floating, below)
        assert qsnr_theory(integer, above) < qsnr_theory(floating, above)


@pytest.mark.parametrize("theory", ["released", "paper"])
def test_limits_of_the_formulas(theory):
    for fmt in ("mxint8", "mxint4", "nvint4"):
        assert qsnr_theory(fmt, 2.0, theory) - qsnr_theory(fmt, 4.0, theory) == pytest.approx(6.0206, abs=1e-4)
    assert qsnr_theory("mxint8", 2.0) - qsnr_theory("mxint6", 2.0) == pytest.approx(12.04)
    assert qsnr_theory("mxfp8_e4m3", 1.0, theory) == pytest.approx(31.86, abs=0.01)
    assert qsnr_theory("mxint8", 2.0, rho=1.0) - qsnr_theory("mxint8", 2.0, rho=2.0) == pytest.approx(6.0206, abs=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_the_formula_foretells_what_sampling_finds(name):
    x, fmt = normal(2000, 512), compared(name)
    made = prepare(x, fmt, 1, Rule(), None)
    rho = (made.steps() * fmt.elements.max / made.blocks.abs().amax(1, keepdim=True)).mean().item()
    kappa = mean_crest(x, fmt.block)
    found = qsnr(x, fake_quantize(x, fmt))
    assert abs(found - qsnr_theory(fmt, kappa, rho=rho, exact_codes=True)) <= 0.6
    if name.endswith("int4"):
        assert qsnr_theory(fmt, kappa, rho=rho) - qsnr_theory(fmt, kappa, rho=rho, exact_codes=True) == pytest.approx(1.16, abs=0.01)


def test_the_crossover_on_data():
    blocks = normal(400_000, 16, seed=1)
    kappa = crest_factor(blocks, 16)
    ours, theirs = (fake_quantize(blocks, name).double() for name in ("nvint4", "nvfp4"))

    def advantage(low: float, high: float) -> float:
        inside = (kappa >= low) & (kappa < high)
        return qsnr(blocks[inside], ours[inside]) - qsnr(blocks[inside], theirs[inside])

    assert advantage(1.5, 1.7) > 3
    assert advantage(2.9, 3.1) < -2.5
    assert advantage(2.1, 2.2) > 0 > advantage(2.4, 2.5)


@pytest.mark.parametrize("name", ALL)
def test_the_papers_casts_are_the_shared_formats(name):
    x = normal(40, 96)
    fmt = compared(name)
    assert torch.equal(Quantiser.of(name)(x), fake_quantize(x, fmt))
    assert torch.equal(Quantiser.of(name)(x, 0), fake_quantize(x, fmt, 0))
    if fmt.scale == "e8m0":
        scale = prepare(x, fmt, 1, Rule(), None).scales.view(40, 3)
        top = x.view(40, 3, 32).abs().amax(2) / fmt.elements.max
        assert torch.equal(scale, torch.exp2(torch.ceil(torch.log2(top.double()))).float())  # rounded up


def test_the_released_scale_is_the_product_in_bfloat16():
    x = normal(8, 64)
    for name in ("nvfp4", "nvint4"):
        exact = prepare(x, FORMATS[name], 1, Rule(), None)
        step = (exact.scales * exact.whole).bfloat16().float()
        expected = (x.view(-1, 16, 1) / step).view(8, 64)
        from fewer.lowbit import cast

        expected = (cast(expected, FORMATS[name].element).view(-1, 16, 1) * step).view(8, 64)
        released = Quantiser(FORMATS[name], released_nv_scale=True)
        assert torch.equal(released(x), expected)
        assert not torch.equal(released(x), Quantiser.of(name)(x))


def test_twentyone_of_128_mantissas_come_to_128():
    x = (1 + torch.arange(128) / 128).bfloat16()
    reached = (x / (x / 127)).float().round()
    assert (reached == 128).sum() == 21
    blocks = -x[:, None].expand(-1, 4).contiguous()
    fmt = BlockFormat("int8", 4, "bf16")
    steps = (x / 127).float()
    low, kept = (Quantiser(fmt, clip, torch.bfloat16)(blocks).float()[:, 0] for clip in ("asymmetric", "symmetric"))
    assert (low / steps).round().min() == -128
    assert (kept / steps).abs().max() <= 127.5
    assert (Quantiser(fmt)(x[:, None]).float() / (x.float()[:, None] / 127)).abs().round().max() <= 127


def test_the_asymmetric_range_biases_a_cast():
    assert signed_error(BIASED, 0) < -10
    assert abs(signed_error(UNBIASED, 0)) <= 4
    assert abs(signed_error(Quantiser.of("mxint8"), 0)) <= 4


def test_rotation_of_one_hot_and_equal_blocks():
    one_hot, equal = torch.zeros(4, 32), torch.ones(4, 32)
    one_hot[:, 5] = 3.0
    assert mean_crest(one_hot, 32) == pytest.approx(math.sqrt(32))
    assert mean_crest(hadamard(one_hot, 32), 32) == pytest.approx(1)
    assert mean_crest(hadamard(equal, 32), 32) == pytest.approx(math.sqrt(32))
    report = analyse_tensor(one_hot, rotate="block")
    assert report.kappa["mxint8"] == pytest.approx(1)
    assert report.predicted["mx8"] == report.winner["mx8"] or report.qsnr["mxint8"] == math.inf


def test_reports_of_tensors():
    x = normal(64, 96) * 10.0 ** normal(64, 1, seed=2)
    x[3] = 0
    report = analyse_tensor(x)
    assert report.kappa["mxint8"] == report.kappa["mxfp8_e4m3"] != report.kappa["nvfp4"]
    for name in ALL:
        assert report.qsnr[name] == qsnr(x, Quantiser.of(name)(x))
    for pair, (integer, floating) in PAIRS.items():
        assert report.winner[pair] == (integer if report.qsnr[integer] > report.qsnr[floating] else floating)
        assert report.predicted[pair] == (integer if report.kappa[integer] < crossover(pair) else floating)
    assert analyse_tensor(x.T, 0).qsnr == pytest.approx(report.qsnr)
    zero = analyse_tensor(torch.zeros(4, 64))
    assert all(math.isnan(value) for value in (*zero.kappa.values(), *zero.qsnr.values()))
    coarse = analyse_tensor(x, formats=["mxint8", BlockFormat("int8", -1, "fp32"), BlockFormat("int8", 64, "bf16")])
    assert len(coarse.qsnr) == 3
    assert set(coarse.winner) == set()
    constant = analyse_tensor(torch.ones(2, 32))
    assert constant.kappa["mxint8"] == 1
    assert constant.qsnr["mxint8"] > 50


def test_gates():
    ours, theirs = hardware_cost("mxint8"), hardware_cost("mxfp8_e4m3")
    assert (ours["multiplier"], ours["adder"]) == (32 * 64, 2 * 32 * 8)
    assert (theirs["multiplier"], theirs["adder"], theirs["exponent adder"]) == (32 * 16, 32 * 24, 32 * 4)
    assert theirs["aligner"] == pytest.approx(32 * 24 * math.log2(24))
    assert hardware_cost("nvfp4")["adder"] == 16 * (2**3 + 2)
    assert all(each["sum"] == pytest.approx(sum(value for name, value in each.items() if name != "sum")) for each in (ours, theirs))


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda: qsnr_theory("mxint8", 0.9), ValueError, "kappa is 0.9; expected a number of at least 1"),
        (lambda: qsnr_theory("mxint9", 2.0), ValueError, "'mxint9'.*did you mean"),
        (lambda: crossover("mx5"), ValueError, "pair is 'mx5'.*mx8"),
        (lambda: hardware_cost("int8_row"), ValueError, "block is -1; expected a number of lanes"),
        (lambda: analyse_tensor(torch.ones(2, 30), rotate=32), ValueError, "n is 32 and dimension 1 has length 30"),
        (lambda: analyse_tensor(torch.ones(2, 32), rotate=12), ValueError, "rotate is 12; expected a power of two"),
        (lambda: analyse_tensor(torch.tensor([1.0, math.nan])), FloatingPointError, "the tensor has a NaN"),
        (lambda: Quantiser(FORMATS["mxfp4"], "asymmetric"), ValueError, "expected an integer"),
        (lambda: Quantiser(FORMATS["mxfp4"], released_nv_scale=True), ValueError, "expected nvint4 or nvfp4"),
        (lambda: Quantiser(FORMATS["nvfp4"], compute_dtype=torch.bfloat16), ValueError, "expected float32"),
    ],
)
def test_what_is_refused(act, error, words):
    with pytest.raises(error, match=words):
        act()


def test_quantisers_that_differ_have_names_that_differ():
    formats = [
        BlockFormat("int8", 32, scale_rule="floor"),
        BlockFormat("int8", 32, scale_rule="rceil"),
        Quantiser(BlockFormat("int8", 32, scale_rule="rceil"), compute_dtype=torch.bfloat16),
        BlockFormat("int4", 16, "e4m3"),
        BlockFormat("int4", 16, "e4m3", tensor_scale=True),
        BlockFormat("int4", 16, "e4m3", tensor_scale=True, scale_floor=2.0**-6),
        BlockFormat("int4", 16, "e4m3", tensor_scale=True, scale_target=224.0),
        Quantiser(BlockFormat("int4", 16, "e4m3", tensor_scale=True), released_nv_scale=True),
    ]
    assert len(analyse_tensor(torch.randn(4, 64), formats=formats).qsnr) == len(formats)


def test_numpys_numbers_are_crest_factors_too():
    assert qsnr_theory("mxint8", np.float32(3.0)) == qsnr_theory("mxint8", 3.0)
