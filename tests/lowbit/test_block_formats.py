"""Block formats: codes and scales held against torchao's, scale rules at their borders, storage, products and figures."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewer.lowbit import (
    ELEMENTS,
    FORMATS,
    BlockFormat,
    QuantizedTensor,
    block_matmul,
    crest_factor,
    decode,
    fake_quantize,
    qsnr,
    quantize,
    saturation,
    underflow,
)
from fewer.lowbit._shared.blocks import SCALE_RULES, pack, unpack

MX = [name for name, fmt in FORMATS.items() if fmt.scale == "e8m0"]
TORCHAO = {
    "mxfp8_e4m3": torch.float8_e4m3fn,
    "mxfp8_e5m2": torch.float8_e5m2,
    "mxfp6_e2m3": "fp6_e2m3",
    "mxfp6_e3m2": "fp6_e3m2",
    "mxfp4": torch.float4_e2m1fn_x2,
}


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=draw(seed))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, but for which NaN it is."""
    return torch.equal(a.nan_to_num(1.5e38).view(torch.int32), b.nan_to_num(1.5e38).view(torch.int32))


def wide_range() -> torch.Tensor:
    """Blocks with maxima from 2^-100 to 2^100, some exactly on powers of two and on ties of every format."""
    blocks = normal(603, 32)
    powers = torch.ldexp(torch.ones(603), torch.arange(603) % 201 - 100)[:, None]
    blocks[201:402] = (blocks[201:402] * 4).round() / 4
    blocks[402:] = blocks[402:].clamp(-1, 1)
    return blocks * powers


@pytest.mark.parametrize("rule", ["floor", "ceil", "even", "rceil"])
@pytest.mark.parametrize("name", TORCHAO)
def test_codes_and_scales_are_torchaos(name, rule):
    from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx

    x, fmt = wide_range(), replace(FORMATS[name], scale_rule=rule)
    theirs_scale, theirs = to_mx(x, TORCHAO[name], 32, ScaleCalculationMode[rule.upper()])
    ours = quantize(x, fmt)
    keep = torch.ones(len(x), dtype=torch.bool)
    if rule == "rceil":  # torchao takes log2 of a rounded quotient
        ratio = x.abs().amax(1) / ELEMENTS[fmt.element].max
        mantissa = torch.frexp(ratio).mantissa
        keep = (mantissa - 0.5).abs() > 2**-23
    assert torch.equal(ours.scales.view(-1)[keep], theirs_scale.view(torch.uint8).view(-1)[keep])
    codes = ours.codes if fmt.element == "e2m1" else ours.elements()
    assert torch.equal(codes.view(len(x), -1)[keep], theirs.view(torch.uint8).view(len(x), -1)[keep])


@pytest.mark.parametrize("tensor_scale", [True, False])
def test_nvfp4_is_torchaos(tensor_scale):
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

    x = normal(256, 256) * torch.ldexp(torch.ones(256, 1), torch.arange(256)[:, None] % 12 - 6)
    whole = per_tensor_amax_to_scale(x.abs().max()) if tensor_scale else None
    scales, codes = nvfp4_quantize(x, 16, whole)
    ours = quantize(x, BlockFormat("e2m1", 16, "e4m3", tensor_scale, scale_floor=2**-6))
    assert torch.equal(ours.scales.view(-1), scales.view(torch.uint8).view(-1))
    difference = ours.elements().view(-1).int() - unpack(codes.view(torch.uint8).view(-1), 4, x.numel()).int()
    assert (difference != 0).sum() <= x.numel() / 10_000
    assert difference.abs().max() <= 1
    if tensor_scale:
        assert ours.tensor_scale == whole


@pytest.mark.parametrize("name", MX)
def test_scale_rules_at_their_borders(name):
    top, emax = ELEMENTS[FORMATS[name].element].max, ELEMENTS[FORMATS[name].element].max_exponent
    powers = torch.arange(-110, 111)
    at = torch.ldexp(torch.full((221,), top), powers)
    for a, expected in (
        (at, powers),
        (torch.nextafter(at, torch.tensor(math.inf)), powers + 1),
        (torch.nextafter(at, torch.tensor(0.0)), powers),
    ):
        scale, _ = replace(FORMATS[name], scale_rule="rceil").scales_of(a)
        assert torch.equal(scale, torch.ldexp(torch.ones(221), expected.clamp(-127, 127)))
        assert saturation(a[:, None], replace(FORMATS[name], scale_rule="rceil")) == 0
        ratio = a / FORMATS[name].scales_of(a)[0]
        assert ((ratio >= 2**emax) & (ratio < 2 ** (emax + 1))).all()
        exact = [math.log2(each) for each in (1.45 * a.double() / top).tolist()]
        nearest, _ = replace(FORMATS[name], scale_rule="round").scales_of(1.45 * a)  # above the root of 2
        assert torch.equal(nearest, torch.tensor([2.0 ** round(each) for each in exact]))


def test_the_even_rule_rounds_half_up_first():
    for name, m in (("mxfp4", 1), ("mxfp8_e4m3", 3), ("mxint8", 6), ("mxint4", 2)):
        fmt = replace(FORMATS[name], scale_rule="even")
        border = torch.tensor(2 - 2.0 ** -(m + 1))
        low, high = (fmt.scales_of(each[None])[0].item() for each in (torch.nextafter(border, torch.tensor(0.0)), border))
        assert (low, high) == (2.0**-fmt.elements.max_exponent, 2.0 ** (1 - fmt.elements.max_exponent)), name


@pytest.mark.parametrize("name", FORMATS)
def test_a_packed_tensor_is_the_fake_one(name):
    for shape, dim in (((7, 96), -1), (((5, 33)), 1), ((3, 40, 6), 1), ((100,), 0)):
        x = normal(*shape) * 3
        packed = quantize(x, name, dim)
        assert same(packed.dequantize(), fake_quantize(x, name, dim)), (shape, dim)
        torch.testing.assert_close(packed.dequantize(torch.float64).float(), packed.dequantize(), rtol=2e-7, atol=0)
        assert packed.dequantize().is_contiguous()
        noisy = quantize(x.movedim(dim, -1).contiguous(), name, rounding="stochastic", generator=draw(1))
        assert same(noisy.dequantize(), fake_quantize(x.movedim(dim, -1).contiguous(), name, rounding="stochastic", generator=draw(1)))


@pytest.mark.parametrize("name", MX)
def test_twice_is_once(name):
    once = fake_quantize(wide_range(), name)
    assert same(once, fake_quantize(once, name))


@pytest.mark.parametrize("name", MX)
def test_powers_of_two_cancel(name):
    x = normal(64, 64).clamp(-3.9, 3.9)
    x = torch.where(x.abs() < 2**-6, 0.0, x)
    for power in (-110, -100, 120):
        factor = 2.0**power
        assert qsnr(x, fake_quantize(x, name)) == qsnr(x * factor, fake_quantize(x * factor, name))
    subnormal = torch.full((1, 32), 2.0**-127)  # its block's scale is the smallest that there is
    assert fake_quantize(subnormal, name).equal(subnormal)


def test_the_range_of_scales():
    x = 1e-4 * normal(512, 1024)
    scaled = qsnr(x, fake_quantize(x, "nvfp4"))
    alone = qsnr(x, fake_quantize(x, BlockFormat("e2m1", 16, "ue5m3")))
    narrow = qsnr(x, fake_quantize(x, BlockFormat("e2m1", 16, "e4m3")))
    assert scaled == pytest.approx(20.4, abs=0.1)
    assert abs(scaled - alone) <= 0.6
    assert narrow < scaled - 10


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_and_what_is_not_finite(name):
    assert same(fake_quantize(torch.zeros(4, 64), name), torch.zeros(4, 64))
    x = normal(4, 64)
    clean = fake_quantize(x, name)
    for wrong in (math.nan, math.inf, -math.inf):
        x[1, 3] = wrong
        for made in (fake_quantize(x, name), quantize(x, name).dequantize()):
            k = FORMATS[name].block
            last = 64 if k == -1 else k
            if last is None:
                assert made.isnan().all()
                continue
            assert made[1, :last].isnan().all()
            assert not made[1, last:].isnan().any()
            assert not made[[0, 2, 3]].isnan().any()
            if not FORMATS[name].tensor_scale or x.abs().nan_to_num(0, 0, 0).max() == normal(4, 64).abs().max():
                assert same(made[[0, 2, 3]], clean[[0, 2, 3]])


def test_scales_that_would_be_zero():
    x = torch.ones(2, 16)
    x[1] = 1e-7
    wiped = fake_quantize(x, replace(FORMATS["nvfp4"], scale_floor="one"))
    assert (wiped[1] == 0).all()
    assert (fake_quantize(x, "nvfp4")[0] == 1).all()
    scales, whole = FORMATS["nvfp4"].scales_of(torch.tensor([1.0, 1e-7]))
    assert scales.tolist() == [448, 2**-9]
    assert whole == torch.tensor(1 / 2688)
    target, _ = replace(FORMATS["nvfp4"], scale="ue5m3", scale_target=448.0).scales_of(torch.tensor([1.0, 0.5]))
    assert target.tolist() == [448, 224]
    shard = fake_quantize(x[1:], "nvfp4", tensor_amax=torch.tensor(1.0))
    assert same(shard, fake_quantize(x, "nvfp4")[1:])


@pytest.mark.parametrize(
    ("name", "count", "expected"), [("mxfp4", 33, 17 + 2), ("mxfp6_e2m3", 33, 25 + 2), ("nvfp4", 33, 17 + 3 + 4), ("int8_row", 33, 33 + 4)]
)
def test_storage(name, count, expected, tmp_path):
    packed = quantize(normal(count), name)
    assert packed.nbytes == expected
    save_file(packed.to_dict(), tmp_path / "packed.safetensors")
    back = QuantizedTensor.from_dict(load_file(tmp_path / "packed.safetensors"))
    assert same(back.dequantize(), packed.dequantize())
    assert back.fmt == packed.fmt
    assert back.shape == packed.shape
    assert same(copy.deepcopy(packed).dequantize(), packed.dequantize())


def test_bits_a_value():
    named = {name: fmt.bits_per_value for name, fmt in FORMATS.items()}
    assert (named["mxfp4"], named["mxfp6_e3m2"], named["mxint8"], named["nvfp4"], named["nvint4"]) == (4.25, 6.25, 8.25, 4.5, 4.5)


def test_packing_is_little_endian_and_torchaos():
    from torchao.prototype.mx_formats.kernels import pack_uint4

    for bits in range(2, 9):
        for count in (1, 7, 8, 9, 1001):
            codes = torch.randint(0, 2**bits, (count,), generator=draw(count), dtype=torch.uint8)
            packed = pack(codes, bits)
            whole = sum(int(code) << (bits * i) for i, code in enumerate(codes))
            assert bytes(packed.tolist()) == whole.to_bytes(-(-count * bits // 8), "little")
            assert torch.equal(unpack(packed, bits, count), codes)
    even = torch.randint(0, 16, (64,), generator=draw(), dtype=torch.uint8)
    assert torch.equal(pack(even, 4), pack_uint4(even))
    long = torch.randint(0, 16, (1_200_003,), generator=draw(), dtype=torch.uint8)
    assert torch.equal(unpack(pack(long, 4), 4, len(long)), long)


def test_ocps_own_convention():
    x = normal(8, 64)
    packed = quantize(x, "mxint8")
    codes, scales = packed.to_ocp()
    values = decode(codes, "int8").view(8, 2, 32) / 64 * decode(scales, "e8m0")[..., None]
    assert same(values.view(8, 64), packed.dequantize())
    codes, scales = quantize(x, "mxfp4").to_ocp()
    assert torch.equal(scales, quantize(x, "mxfp4").scales)
    with pytest.raises(ValueError, match="the scales are e4m3; expected e8m0"):
        quantize(x, "nvfp4").to_ocp()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["mxfp4", "nvint4"])
def test_other_dtypes_and_layouts(name, dtype):
    x = normal(40, 64).to(dtype)
    made = fake_quantize(x, name)
    assert made.dtype == dtype
    torch.testing.assert_close(made, fake_quantize(x.float(), name).to(dtype), rtol=1e-6, atol=0)  # in double the steps have more digits
    assert torch.equal(fake_quantize(x.mT, name, 0), made.mT)
    assert torch.equal(fake_quantize(x.mT.contiguous(), name, 0), made.mT)
    assert torch.equal(fake_quantize(x[:, ::2], name), fake_quantize(x[:, ::2].contiguous(), name))
    inside = x.clone()
    assert fake_quantize(inside, name, out=inside) is inside
    assert torch.equal(inside, made)
    ragged = x[:, :37].contiguous()
    expected = fake_quantize(ragged, name)
    assert fake_quantize(ragged, name, out=ragged) is ragged
    assert torch.equal(ragged, expected)
    for empty in ((0, 64), (3, 0)):
        assert fake_quantize(x.new_empty(empty), name).shape == empty
        assert quantize(x.new_empty(empty), name).dequantize().shape == empty


def test_large_rows_and_tensors_are_cut_into_pieces():
    x = normal(3, 200_000)
    for name in ("fp8_tensor", "int8_row", "mxfp4"):
        made = fake_quantize(x, name)
        step = x.abs().amax() / 448 if name == "fp8_tensor" else x.abs().amax(1, keepdim=True) / 127
        if name != "mxfp4":
            element = FORMATS[name].element
            from fewer.lowbit import cast

            assert torch.equal(made, cast(x / step, element) * step)
        assert torch.equal(made, quantize(x, name).dequantize())
        assert torch.equal(fake_quantize(x.mT.contiguous(), name, 0), made.mT)


def test_products_of_blocks():
    a, b = normal(17, 100), normal(23, 100, seed=1)
    for name in ("mxfp4", "nvfp4", "mxfp8_e4m3"):
        left, right = quantize(a, name), quantize(b, name)
        assert torch.equal(block_matmul(left, right.T), left.dequantize() @ right.dequantize().T)
        assert torch.equal(right.T.dequantize(), right.dequantize().T)
    left, right = quantize(a, "mxint8"), quantize(b, "mxint8")
    exact = left.dequantize(torch.float64) @ right.dequantize(torch.float64).T
    assert torch.equal(block_matmul(left, right.T, torch.float64), exact)
    torch.testing.assert_close(block_matmul(left, right.T), exact.float(), rtol=1e-5, atol=1e-5)
    down = quantize(b.T.contiguous(), "mxint8", dim=0)
    assert torch.equal(block_matmul(left, down, torch.float64), exact)
    rows = [quantize(each, "int8_row") for each in (a, b)]
    torch.testing.assert_close(block_matmul(rows[0], rows[1].T), rows[0].dequantize() @ rows[1].dequantize().T, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="cut along dim 1"):
        block_matmul(left, right)


def test_the_figures():
    x = torch.empty(1000, 320).uniform_(-127.5, 127.5, generator=draw())
    x[:, ::32] = 127.0  # so that every block's scale is 1
    spread = torch.empty(320_000).uniform_(-127.5, 127.5, generator=draw())
    assert qsnr(spread, spread.clamp(-127.49, 127.49).round()) == pytest.approx(48.13, abs=0.05)
    assert (FORMATS["mxint8"].scales_of(torch.tensor([127.5, 64.0]))[0] == 1).all()
    assert qsnr(x[:, 1::2], fake_quantize(x, "mxint8")[:, 1::2]) == pytest.approx(48.13, abs=0.05)
    one_hot = torch.zeros(3, 32)
    one_hot[0, 5], one_hot[1] = -3.0, 2.0
    assert crest_factor(one_hot, 32).tolist() == pytest.approx([math.sqrt(32), 1, 0])
    assert crest_factor(torch.ones(2, 40), 32).tolist() == [1, 1, 1, 1]
    assert crest_factor(torch.ones(40, 2) * 1e-30, 32, 0).tolist() == [1, 1, 1, 1]
    huge = normal(5, 64) * 1e30
    expected = huge.view(-1, 16).abs().amax(1) / huge.view(-1, 16).double().square().mean(1).sqrt()
    torch.testing.assert_close(crest_factor(huge, 16), expected, rtol=1e-6, atol=0)
    assert underflow(torch.tensor([0.0, 1, 2, 3]), torch.tensor([0.0, 0, 2, 3])) == pytest.approx(1 / 3)
    assert math.isnan(qsnr(torch.zeros(3), torch.zeros(3)))
    assert qsnr(torch.ones(3), torch.ones(3)) == math.inf
    assert saturation(torch.tensor([7.0, 1.0]), "mxfp4") == 0.5


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda x: quantize(x, "mxfp5"), ValueError, "fmt is 'mxfp5'.*mxfp4.*did you mean"),
        (lambda x: quantize(x, "mxfp4", dim=2), ValueError, "dim is 2 and x has 2 dimensions; expected one from -2 to 1"),
        (lambda x: quantize(x.sum(), "mxfp4"), ValueError, "x has 0 dimensions"),
        (lambda x: quantize(x.long(), "mxfp4"), ValueError, "x is torch.int64"),
        (lambda x: fake_quantize(x, "mxfp4", rounding="stochastic"), ValueError, "generator None"),
        (lambda x: fake_quantize(x, "nvfp4", tensor_amax=math.nan), ValueError, "tensor_amax is nan; expected a finite number"),
        (lambda x: fake_quantize(x, "mxfp4", out=torch.empty(2)), ValueError, r"out is \(2,\).*expected a contiguous tensor \(2, 32\)"),
        (lambda x: BlockFormat("e2m1", 0), ValueError, "block is 0; expected a whole number of at least 1"),
        (lambda x: BlockFormat("e2m1", 32, "e9m0"), ValueError, "scale is 'e9m0'.*e8m0"),
        (lambda x: BlockFormat("e2m1", scale_rule="down"), ValueError, f"scale_rule is 'down'.*{SCALE_RULES[0]}"),
        (lambda x: BlockFormat("e2m1", 16, "e4m3", scale_floor=math.nan), ValueError, "scale_floor is nan"),
        (lambda x: BlockFormat("e2m1", 16, "e4m3", scale_target=0), ValueError, "scale_target is 0"),
        (lambda x: BlockFormat("e2m1", 16, "fp32", tensor_scale=True), ValueError, "tensor_scale is given.*leave it out"),
        (lambda x: QuantizedTensor.from_dict({"codes": x}), ValueError, "no packed tensors.*to_dict"),
        (lambda x: qsnr(x, x[:1]), ValueError, "expected equal shapes"),
    ],
)
def test_what_is_refused(act, error, words):
    with pytest.raises(error, match=words):
        act(torch.ones(2, 32))


def test_a_packed_tensor_that_was_cut_short_is_refused():
    kept = quantize(torch.ones(2, 33), "mxfp4").to_dict()
    for name, wrong in (("codes", kept["codes"][:-1]), ("scales", kept["scales"][:1]), ("scales", kept["scales"].float())):
        with pytest.raises(ValueError, match=f"{name} are .*expected.*pack it again"):
            QuantizedTensor.from_dict(kept | {name: wrong})


@pytest.mark.parametrize("whole", [torch.ones(3), torch.ones((), dtype=torch.int64)])
def test_a_tensor_scale_that_is_no_number_is_refused(whole):
    kept = quantize(torch.ones(2, 32), "nvfp4").to_dict() | {"tensor_scale": whole}
    with pytest.raises(ValueError, match="tensor_scale is .*expected one float32 number"):
        QuantizedTensor.from_dict(kept)


def test_numbers_beyond_float32_end_at_its_largest():
    made = fake_quantize(torch.full((1, 16), 1e200, dtype=torch.float64), "nvfp4")
    assert made.isfinite().all()
    assert (made > 1e38).all()
