"""Element formats: every code, every tie, held against ml_dtypes; and what rounding may do."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewer.lowbit import ELEMENTS, cast, decode, encode, integer

PEERS = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e8m0": ml_dtypes.float8_e8m0fnu,
}
TABLE = {  # bits, max, min normal, min subnormal, lowest: the specification's
    "e2m1": (4, 6, 1, 0.5, -6),
    "e2m3": (6, 7.5, 1, 0.125, -7.5),
    "e3m2": (6, 28, 0.25, 0.0625, -28),
    "e4m3": (8, 448, 2**-6, 2**-9, -448),
    "e5m2": (8, 57344, 2**-14, 2**-16, -57344),
    "ue5m3": (8, 61440, 2**-14, 2**-17, 0),
    "ue5m3fn": (8, 114688, 2**-14, 2**-17, 0),
    "ue4m3": (8, 448, 2**-6, 2**-9, 0),
    "e8m0": (8, 2.0**127, 2.0**-127, 2.0**-127, 2.0**-127),
    "int8": (8, 127, 1, 1, -127),
    "int6": (6, 31, 1, 1, -31),
    "int4": (4, 7, 1, 1, -7),
    "int4_asymmetric": (4, 7, 1, 1, -8),
}
DETERMINISTIC = ("nearest", "nearest-away", "toward-zero", "up", "down")


def bits(x: torch.Tensor) -> torch.Tensor:
    """What tells -0 from 0; every NaN alike."""
    return torch.where(x.isnan(), math.nan, x).view(torch.int32)


def neighbours(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, torch.nextafter(x, torch.tensor(math.inf)), torch.nextafter(x, torch.tensor(-math.inf))])


def grid(name: str) -> torch.Tensor:
    values = ELEMENTS[name].values
    values = values[values.isfinite()]
    return values[(values >= ELEMENTS[name].lowest)].unique()


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", TABLE)
def test_the_table_of_the_specification(name):
    element = ELEMENTS[name]
    assert (element.bits, element.max, element.min_normal, element.min_subnormal, element.lowest) == TABLE[name]
    assert len(element.values) == 2**element.bits


@pytest.mark.parametrize("name", PEERS)
def test_every_code_is_ml_dtypes_value(name):
    codes = np.arange(2 ** ELEMENTS[name].bits, dtype=np.uint8)
    assert torch.equal(bits(decode(torch.from_numpy(codes), name)), bits(torch.from_numpy(codes.view(PEERS[name]).astype(np.float32))))


def test_codes_of_the_unsigned_formats():
    scales, wide, e5m2, e4m3 = (ELEMENTS[name].values for name in ("ue5m3", "ue5m3fn", "e5m2", "e4m3"))
    assert torch.equal(scales[0 : 2 * 0x7C : 2], e5m2[:0x7C])
    assert scales[0xF7] == 61440
    assert scales[0xF8] == math.inf
    assert scales[0xF9:].isnan().all()
    assert torch.equal(wide[:0xF8], scales[:0xF8])
    assert wide[0xFE] == 114688
    assert wide[0xFF].isnan()
    assert (scales[:0xF8].diff() > 0).all()
    assert (wide[:0xFF].diff() > 0).all()
    assert torch.equal(bits(ELEMENTS["ue4m3"].values[:0x80]), bits(e4m3[:0x80]))
    assert ELEMENTS["ue4m3"].values[0x80:].isnan().all()


@pytest.mark.parametrize("name", PEERS)
def test_nearest_is_ml_dtypes_rounding(name):
    values = grid(name)
    middles = ((values[1:].double() + values[:-1].double()) / 2).float()
    log_uniform = (
        torch.empty(10**6).uniform_(math.log(max(ELEMENTS[name].min_subnormal / 8, 2.0**-126)), math.log(ELEMENTS[name].max)).exp_()
    )
    x = torch.cat([values, neighbours(middles), log_uniform, -log_uniform if ELEMENTS[name].signed else log_uniform])
    if name == "e8m0":
        x = x[x >= 2.0**-126]  # ml_dtypes takes subnormals below their middle up
    x = x[x.abs() <= ELEMENTS[name].max]
    assert torch.equal(bits(cast(x, name)), bits(torch.from_numpy(x.numpy().astype(PEERS[name]).astype(np.float32))))


@pytest.mark.parametrize("name", ELEMENTS)
def test_what_lies_on_the_grid_stays_there(name):
    values = grid(name)
    if ELEMENTS[name].signed and not ELEMENTS[name].is_integer:
        values = torch.cat([values, torch.tensor([-0.0])])
    for rounding in DETERMINISTIC:
        assert torch.equal(bits(cast(values, name, rounding)), bits(values)), rounding
    for seed in range(100):
        assert torch.equal(bits(cast(values, name, "stochastic", generator=draw(seed))), bits(values))
    assert torch.equal(bits(cast(values, name, "stochastic", generator=draw(), random_bits=8)), bits(values))
    assert torch.equal(bits(decode(encode(values, name), name)), bits(values))
    finite = ELEMENTS[name].values.isfinite() & (ELEMENTS[name].values >= ELEMENTS[name].lowest)
    assert torch.equal(encode(ELEMENTS[name].values[finite], name), torch.arange(2 ** ELEMENTS[name].bits, dtype=torch.uint8)[finite])


@pytest.mark.parametrize("name", ["e2m1", "e4m3", "e5m2", "ue5m3", "int4", "int8"])
def test_directed_roundings_enclose(name):
    element = ELEMENTS[name]
    x = torch.randn(20_000, generator=draw()) * element.max / 3
    x = x[(x >= element.lowest) & (x <= element.max)]
    down, nearest, up = (cast(x, name, rounding) for rounding in ("down", "nearest", "up"))
    assert (down <= x).all()
    assert (x <= up).all()
    values = grid(name)
    gap = torch.searchsorted(values, up) - torch.searchsorted(values, down)
    assert ((gap == 1) | ((gap == 0) & (x == up))).all()
    assert ((nearest - x).abs() <= (up - down) / 2).all()
    zero = cast(x, name, "toward-zero")
    assert torch.equal(zero.abs(), torch.minimum(up.abs(), down.abs()))
    assert ((cast(x, name, "nearest-away") - x).abs() <= (up - down) / 2).all()


def test_ties_and_their_neighbours():
    middles = torch.tensor([0.25, 0.75, 1.25, 2.5, 3.5, 5.0])
    x = torch.cat([middles, -middles])
    assert cast(x, "e2m1").tolist() == [0.0, 1.0, 1.0, 2.0, 4.0, 4.0, -0.0, -1.0, -1.0, -2.0, -4.0, -4.0]
    assert cast(x, "e2m1", "nearest-away").tolist() == [0.5, 1.0, 1.5, 3.0, 4.0, 6.0, -0.5, -1.0, -1.5, -3.0, -4.0, -6.0]
    below = torch.nextafter(torch.tensor([0.25]), torch.tensor(0.0))  # adding a half would round it up in float32
    assert cast(below, "e2m1", "nearest-away").item() == 0.0
    assert cast(torch.tensor([0.49999997]), "int4", "nearest-away").item() == 0.0
    assert cast(torch.tensor([-0.2, -0.0]), "e2m1").signbit().tolist() == [True, True]
    assert cast(torch.tensor([-0.2, -0.0]), "int4").signbit().tolist() == [False, False]


def test_what_lies_beyond_the_range():
    x = torch.tensor([464.0, 464.1, 1e30, -1e30, math.inf, -math.inf, math.nan])
    assert torch.equal(bits(cast(x, "e4m3")), bits(torch.tensor([448.0, 448, 448, -448, math.nan, math.nan, math.nan])))
    special = torch.tensor([448.0, math.nan, math.nan, math.nan, math.nan, math.nan, math.nan])
    assert torch.equal(bits(cast(x, "e4m3", overflow="special")), bits(special))
    assert cast(x, "e5m2").tolist()[:6] == [448, 448, 57344, -57344, math.inf, -math.inf]
    assert cast(torch.tensor([61439.0, 61440.0, -7e4]), "e5m2", overflow="special").tolist() == [57344, math.inf, -math.inf]
    assert cast(torch.tensor([-3.0, 7e4, math.inf]), "ue5m3").tolist() == [0, 61440, math.inf]
    assert cast(torch.tensor([-9.0, -7.6, 9.0]), integer(4, symmetric=False)).tolist() == [-8, -8, 7]
    assert cast(torch.tensor([0.0, -1.0, 3.0, 1e-39]), "e8m0").tolist() == [2.0**-127, 2.0**-127, 4.0, 2.0**-127]
    many = torch.full((1000,), 470.0)
    assert (cast(many, "e4m3", "stochastic", generator=draw()) == 448).all()
    assert cast(many, "e4m3", "stochastic", "special", draw()).isnan().all()


@pytest.mark.parametrize("random_bits", [None, 8])
def test_stochastic_rounding_is_unbiased_and_of_the_right_variance(random_bits):
    draws, generator = 200_000, draw(3)
    for x in (0.1, 0.6, 1.9, 1.99, 2.01, 2.5, 3.9, 4.1, 5.9, -0.3, -1.2, -5.1):
        q = cast(torch.full((draws,), x), "e2m1", "stochastic", generator=generator, random_bits=random_bits).double()
        values = grid("e2m1").double()
        lo, hi = values[values <= x].max().item(), values[values >= x].min().item()
        assert set(q.unique().tolist()) <= {lo, hi}
        variance = (x - lo) * (hi - x)
        coarse = 0.0 if random_bits is None else (hi - lo) / 512  # eight bits hit a probability to within 1/512
        assert abs(q.mean().item() - x) <= 4 * math.sqrt(variance / draws) + coarse
        if 0.05 <= (x - lo) / (hi - lo) <= 0.95:
            assert q.var().item() == pytest.approx(variance, rel=0.03)


def test_eight_random_bits_as_the_paper_counts_them():
    """hi where delta + (2 r + 1) / 512 >= 1: of the 256 r exactly round(256 delta) take it up (half up)."""
    from fewer.lowbit._shared.formats import Rule

    class Counted(Rule):
        def _words(self, like, dtype):
            return torch.arange(256, dtype=torch.uint8).view(like.shape)

    for delta in (0.0, 0.001, 1 / 512, 0.1, 0.5, 0.7, 0.999):
        up = Counted("stochastic", draw(), 8).whole(torch.full((256,), delta)).sum().item()
        assert up == math.floor(256 * delta + 0.5)


def test_a_generator_is_all_the_state():
    x = torch.randn(1000, generator=draw())
    first = draw(5)
    one, two = (cast(x, "e2m1", "stochastic", generator=first) for _ in range(2))
    assert torch.equal(one, cast(x, "e2m1", "stochastic", generator=draw(5)))
    assert not torch.equal(one, two)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    cast(x, "e2m1", "stochastic", generator=first)
    assert torch.equal(before, torch.get_rng_state())


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["e2m1", "e2m3", "e3m2", "e4m3", "e5m2", "int5"]),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40),
)
def test_a_cast_is_odd_monotone_and_the_same_in_double(name, numbers):
    x = torch.tensor(numbers).sort().values
    x = x[x.isfinite()]
    q = cast(x, name)
    assert (q.diff() >= 0).all()
    assert torch.equal(q, -cast(-x, name))
    assert torch.equal(q, cast(x.double(), name).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_and_layouts(dtype):
    x = torch.randn(33, 7, generator=draw()).to(dtype)
    q = cast(x, "e4m3")
    assert q.dtype == dtype
    assert torch.equal(q.float(), cast(x.float(), "e4m3"))
    assert torch.equal(cast(x.mT, "e4m3"), q.mT)
    assert torch.equal(cast(x[:, ::2], "e4m3"), q[:, ::2])
    assert cast(x[:0], "e4m3").shape == (0, 7)
    assert cast(x[0, 0], "e4m3").shape == ()
    assert not cast(x.requires_grad_(), "e4m3").requires_grad
    fine = torch.tensor([1.0625 + 2**-40], dtype=torch.float64)  # just above a middle, which float32 does not see
    assert cast(fine, "e4m3").item() == 1.125


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda x: cast(x, "e4m4"), ValueError, "element is 'e4m4'.*e4m3.*did you mean"),
        (lambda x: cast(x, "e4m3", "even"), ValueError, "rounding is 'even'.*nearest"),
        (lambda x: cast(x, "e4m3", overflow="wrap"), ValueError, "overflow is 'wrap'.*saturate"),
        (lambda x: cast(x, "e2m1", overflow="special"), ValueError, "e2m1 has neither inf nor NaN.*leave it out"),
        (lambda x: cast(x, "e2m1", "stochastic"), ValueError, "generator None.*explicit generator.*pass generator"),
        (lambda x: cast(x, "e2m1", "stochastic", generator=draw(), random_bits=9), ValueError, "random_bits is 9"),
        (lambda x: cast(x.int(), "e2m1"), ValueError, "x is torch.int32.*expected a tensor of float32.*convert"),
        (lambda x: cast(x + 0j, "e2m1"), ValueError, "x is torch.complex64.*expected"),
        (lambda x: cast(x.to("meta"), "e2m1", "stochastic", generator=draw()), TypeError, "generator is on cpu and x on meta"),
        (lambda x: encode(x * math.nan, "e2m1"), ValueError, "x has a NaN.*e2m1 no code.*clean"),
        (lambda x: decode(torch.tensor([16]), "e2m1"), ValueError, "codes reach from 16 to 16; expected 0 to 15"),
        (lambda x: decode(x, "e2m1"), ValueError, "codes are torch.float32; expected a tensor of integers"),
        (lambda x: integer(9), ValueError, "bits is 9"),
    ],
)
def test_what_is_refused(act, error, words):
    with pytest.raises(error, match=words):
        act(torch.ones(3))
