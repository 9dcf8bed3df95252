"""How a tensor is cast, the paper's way and the ways it warns of."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fewer.checks import check_choice
from fewer.lowbit._shared.block_formats import BlockFormat
from fewer.lowbit._shared.blocks import block_amax, checked_dim, cut, fake_quantize, prepare, uncut
from fewer.lowbit._shared.formats import Rule, cast, check_floating
from fewer.lowbit.int_vs_fp.theory import compared


@dataclass(frozen=True)
class Quantiser:
    """A cast to a block format. `Quantiser(fmt)(x)` are the values that it leaves.

    Attributes:
        fmt: the format.
        clip: "symmetric": integers to [-127, 127] (of 8 bits); "asymmetric": to [-128, 127], which biases every block downwards.
        compute_dtype: of scales and quotients. In bfloat16 x / (max / 127) rounds to 128 for 21 of the 128 mantissas.
        released_nv_scale: NV formats with the product of both scales rounded to bfloat16, as the released code's type promotion has it.

    Source: arXiv 2510.25602, sections 2 and 3.3, appendix A.

    Examples:
        >>> Quantiser.of("mxint8")(torch.tensor([1.0, -0.3])).tolist()
        [1.0, -0.296875]
    """

    fmt: BlockFormat
    clip: Literal["symmetric", "asymmetric"] = "symmetric"
    compute_dtype: torch.dtype = torch.float32
    released_nv_scale: bool = False

    def __post_init__(self) -> None:
        check_choice(("symmetric", "asymmetric"), clip=self.clip)
        check_choice((torch.float32, torch.bfloat16, torch.float16), compute_dtype=self.compute_dtype)
        if self.clip == "asymmetric" and not self.fmt.elements.is_integer:
            raise ValueError(f"clip is 'asymmetric' and the element {self.fmt.element}; expected an integer: leave it out")
        if self.released_nv_scale and not self.fmt.tensor_scale:
            raise ValueError("released_nv_scale is set and the format has no tensor scale; expected nvint4 or nvfp4: leave it out")
        if self.compute_dtype != torch.float32 and self.fmt.tensor_scale:
            raise ValueError(f"compute_dtype is {self.compute_dtype} and the format has a tensor scale; expected float32: leave it out")

    @classmethod
    def of(cls, fmt: str | BlockFormat | Quantiser) -> Quantiser:
        """The paper's cast to a format of that name, or the quantiser itself."""
        return fmt if isinstance(fmt, Quantiser) else cls(compared(fmt))

    @property
    def name(self) -> str:
        """What tells it from others, in words."""
        fmt, words = self.fmt, [self.fmt.element, f"blocks of {self.fmt.block}", f"{self.fmt.scale} scales"]
        words += [f"rule {fmt.scale_rule}"] * (fmt.scale == "e8m0" and fmt.scale_rule != "rceil")
        words += ["tensor scale"] * fmt.tensor_scale + [f"floor {fmt.scale_floor}"] * (fmt.scale_floor is not None)
        words += [f"target {fmt.scale_target}"] * (fmt.scale_target is not None) + [self.clip] * (self.clip != "symmetric")
        words += [f"in {self.compute_dtype}".replace("torch.", "")] * (self.compute_dtype != torch.float32)
        return ", ".join([*words, *["bfloat16 scales' product"] * self.released_nv_scale])

    def __call__(self, x: Tensor, dim: int = -1) -> Tensor:
        """x as the format holds it, blocks along a dimension; x's dtype. No gradient flows through."""
        if self.compute_dtype != torch.float32 or self.clip == "asymmetric":
            return self._in_its_arithmetic(x, dim)
        if self.released_nv_scale:
            return self._released(x, dim)
        return fake_quantize(x, self.fmt, dim)

    @torch.no_grad()
    def _released(self, x: Tensor, dim: int) -> Tensor:
        check_floating(x)
        dim = checked_dim(x, dim)
        made = prepare(x.contiguous(), self.fmt, dim, Rule(), None)
        rounded = replace(made, scales=made.steps().bfloat16().to(made.scales.dtype), whole=None)
        return uncut(rounded.into(torch.empty_like(made.blocks)), x.shape, dim).contiguous()

    @torch.no_grad()
    def _in_its_arithmetic(self, x: Tensor, dim: int) -> Tensor:
        check_floating(x)
        dim = checked_dim(x, dim)
        blocks = cut(x.contiguous(), self.fmt.block, dim).to(self.compute_dtype)
        top = self.fmt.elements.max
        scale = block_amax(blocks).to(self.compute_dtype) / top
        if self.fmt.scale == "e8m0":
            mantissa, exponent = torch.frexp(scale.float())
            scale = torch.ldexp(torch.ones_like(mantissa), (exponent - 1 + (mantissa > 0.5)).clamp(-126, 127)).to(self.compute_dtype)
        quotient = blocks / torch.where(scale == 0, 1.0, scale)
        if self.fmt.elements.is_integer:
            lowest = -top - 1 if self.clip == "asymmetric" else -top
            q = quotient.round_().clamp_(lowest, top)
        else:
            q = cast(quotient, self.fmt.elements)
        return uncut(q * scale, x.shape, dim).contiguous().to(x.dtype)


def rotation_of(fmt: Quantiser, rotate: int | str | None) -> int:
    """The size of a rotation in numbers, 0 for none."""
    if rotate is None:
        return 0
    if rotate == "block":
        if not fmt.fmt.block or fmt.fmt.block < 1:
            raise ValueError(f"rotate is 'block' and the format's block {fmt.fmt.block}; expected a size: give it as a number")
        return fmt.fmt.block
    if not isinstance(rotate, int) or isinstance(rotate, bool) or rotate < 1 or rotate & (rotate - 1):
        raise ValueError(f"rotate is {rotate!r}; expected a power of two, 'block' or None")
    return rotate


def random_signs(width: int, seed: int, name: str) -> Tensor:
    """float32 [width] of +1 and -1, drawn from the seed and the layer's name."""
    drawn = int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest())
    return torch.randint(0, 2, (width,), generator=torch.Generator().manual_seed(drawn)) * 2.0 - 1.0
