"""A point of the design space of four-bit training: one frozen dataclass, the known recipes by name, and what a recipe costs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from fewer.checks import check_choice, check_positive, check_share, check_whole, is_whole
from fewer.lowbit._shared.block_formats import BlockFormat, ScaleRule
from fewer.lowbit._shared.formats import ELEMENTS

Operand = Literal["x", "w", "dy", "w_dgrad", "x_wgrad"]
Hadamard = Literal["none", "wgrad", "backward", "all"]
Estimator = Literal["ste", "dge", "spline", "ramp"]
ScaleGradient = Literal["none", "absmax", "softmax"]

SCALES = ("e8m0", "e4m3", "ue5m3", "ue5m3fn", "fp32", "bf16")
NO_CAST = "fp32"  # the element of a recipe that casts nothing
STOCHASTIC = ("dy", "w_dgrad", "x_wgrad")  # the forward product rounds to nearest
ROTATED = {"none": (), "wgrad": ("wgrad",), "backward": ("dgrad", "wgrad"), "all": ("forward", "dgrad", "wgrad")}

ESTIMATOR_COST = {"ste": 0, "dge": 2, "spline": 2, "ramp": 2}  # elementwise operations an operand element
SCALE_GRADIENT_COST = {"none": 0, "absmax": 3, "softmax": 8}
CAST_COST, TENSOR_SCALE_COST, STOCHASTIC_COST, CLAMP_COST = 3, 1, 2, 3  # block maximum, scale and rounding are 3


def check_power_of_two(least: int, **values: Any) -> None:
    """ValueError for a value that is no power of two, or too small."""
    for name, value in values.items():
        if not is_whole(value) or value < least or value & (value - 1):
            raise ValueError(f"{name} is {value!r}; expected a power of two of at least {least}")


@dataclass(frozen=True)
class Overhead:
    """What a recipe adds to the three products of a linear layer.

    Attributes:
        operations: elementwise operations of forward and backward pass together.
        relative: the same over the 2 M N K multiplications and additions of one product.
        kept_bytes: what is kept for the backward pass.
    """

    operations: float
    relative: float
    kept_bytes: int


@dataclass(frozen=True)
class FP4Recipe:
    """How the three products of a linear layer are made of four-bit operands; arXiv 2509.17791.

    Args:
        element: format of the operands' elements; "fp32" casts nothing.
        scale: format of the blocks' scales: e8m0, e4m3, ue5m3, ue5m3fn, fp32 or bf16.
        block: values that share a scale, a power of two of at least 4.
        tensor_scale: "off"; "current": one scale for the whole operand from its maximum; D: that maximum is measured every D-th step and held.
            Power-of-two and floating point scales need none and take none.
        scale_target: the scale that the tensor's maximum is brought to; below the format's own maximum it leaves head-room.
        stochastic: the operands that are rounded stochastically: "dy" (both uses, two draws), "w_dgrad", "x_wgrad".
        sr_bits: random bits of stochastic rounding; None is exact, 8 the fast mode.
        hadamard: the products whose two operands are rotated along the contraction: "none", "wgrad", "backward", "all".
        hadamard_size: entries of a rotation, a power of two; None is the block.
        estimator: derivative of the cast: "ste" (1), "dge" (power 1/5, at most 3), "spline" (smoothstep), "ramp".
        scale_gradient: what reaches a block's maximum through its scale: "none", "absmax", "softmax".
        weight_blocks: "2d": tiles of block x block weights share a scale, so that a cast transposed is the transpose's cast.
        zero_scale: a block's scale that rounds to 0 becomes the smallest one ("floor") or one ("one": the block becomes 0).
        scale_rule: rounding of power-of-two scales: "rceil", "floor", "ceil", "even", "round".
        clamp: X beyond this quantile of its magnitudes is multiplied apart, in full precision; None: nothing is.
        loss_scale: what dY is multiplied by before its casts; the products are divided by it.
        pack_saved: keep what the backward pass needs in its bits; False keeps its values in full precision, which is quicker.
        sync_amax: tensors' maxima are those of all processes of torch.distributed.
        seed: of stochastic rounding and the rotations' signs.

    Raises:
        ValueError: an unknown word, a number out of its range, a target above the scale format's maximum.

    Examples:
        >>> recipe = FP4Recipe.preset("nvfp4")
        >>> recipe.scale, recipe.block, sorted(recipe.stochastic)
        ('e4m3', 16, ['dy'])
        >>> FP4Recipe.from_json(recipe.to_json()) == recipe
        True
    """

    element: str = "e2m1"
    scale: str = "ue5m3"
    block: int = 16
    tensor_scale: str | int = "current"
    scale_target: float = 448.0
    stochastic: frozenset[str] = frozenset({"dy"})
    sr_bits: int | None = None
    hadamard: Hadamard = "none"
    hadamard_size: int | None = None
    estimator: Estimator = "ste"
    scale_gradient: ScaleGradient = "none"
    weight_blocks: Literal["1d", "2d"] = "1d"
    zero_scale: Literal["floor", "one"] = "floor"
    scale_rule: ScaleRule = "rceil"
    clamp: float | None = None
    loss_scale: float = 1.0
    pack_saved: bool = True
    sync_amax: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice((*(name for name, each in ELEMENTS.items() if each.signed), NO_CAST), element=self.element)
        if isinstance(self.stochastic, str) or not isinstance(self.stochastic, Iterable):
            raise ValueError(f"stochastic is {self.stochastic!r}; expected a set of operands, such as {{'dy'}}: put it in a set")
        check_choice(SCALES, scale=self.scale)
        check_choice(tuple(ROTATED), hadamard=self.hadamard)
        check_choice(get_args(Estimator), estimator=self.estimator)
        check_choice(get_args(ScaleGradient), scale_gradient=self.scale_gradient)
        check_choice(("1d", "2d"), weight_blocks=self.weight_blocks)
        check_choice(("floor", "one"), zero_scale=self.zero_scale)
        for each in self.stochastic:
            check_choice(STOCHASTIC, stochastic=each)
        object.__setattr__(self, "stochastic", frozenset(self.stochastic))
        check_power_of_two(4, block=self.block)
        if self.hadamard_size is not None:
            check_power_of_two(2, hadamard_size=self.hadamard_size)
        if self.tensor_scale not in ("off", "current") and (not is_whole(self.tensor_scale) or int(self.tensor_scale) < 1):
            raise ValueError(f'tensor_scale is {self.tensor_scale!r}; expected "off", "current", or a number of steps from 1')
        check_positive(scale_target=self.scale_target, loss_scale=self.loss_scale)
        if self.scale in ELEMENTS and self.scale != "e8m0" and self.scale_target > ELEMENTS[self.scale].max:
            largest = ELEMENTS[self.scale].max
            raise ValueError(f"scale_target is {self.scale_target}; expected at most {largest:g}, the largest {self.scale}: lower it")
        if self.sr_bits not in (None, 8):
            raise ValueError(f"sr_bits is {self.sr_bits!r}; expected None (exact) or 8")
        if self.clamp is not None:
            check_share(ends=False, clamp=self.clamp)
            if self.keeps_operands:
                raise ValueError(
                    f"clamp is {self.clamp} and estimator {self.estimator!r}, scale_gradient {self.scale_gradient!r}; expected the straight-through "
                    "gradient beside a clamp: leave one of them out"
                )
        check_whole(0, seed=self.seed)
        if self.casts:
            self.format  # noqa: B018 - an unknown rule is told here

    @classmethod
    def preset(cls, name: str) -> FP4Recipe:
        """A known recipe: "mxfp4", "mxfp4-sr-rht", "nvfp4", "nvfp4-te", "ue5m3", "paper", "follow-up"."""
        check_choice(tuple(PRESETS), preset=name)
        return cls(**PRESETS[name])

    def replace(self, **changes: Any) -> FP4Recipe:
        """The same recipe with some fields changed."""
        known = {each.name for each in fields(self)}
        for name in changes:
            check_choice(known, field=name)
        return replace(self, **changes)

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"stochastic": sorted(self.stochastic)}, default=lambda number: number.item())  # NumPy's

    @classmethod
    def from_json(cls, text: str) -> FP4Recipe:
        """The recipe that `to_json` wrote; ValueError for anything else."""
        try:
            given = json.loads(text)
        except ValueError as error:
            raise ValueError(f"the recipe is no JSON ({error}); expected what to_json wrote") from error
        if not isinstance(given, Mapping):
            raise ValueError(f"the recipe is a JSON {type(given).__name__}; expected an object, what to_json wrote")
        return cls().replace(**given)

    @property
    def casts(self) -> bool:
        return self.element != NO_CAST

    @property
    def scaled_by_tensor(self) -> bool:
        """Whether an operand has a scale of its own above its blocks' scales."""
        return self.tensor_scale != "off" and self.scale in ELEMENTS and self.scale != "e8m0"

    @property
    def hold(self) -> int:
        """Steps that a measured maximum serves."""
        return int(self.tensor_scale) if self.tensor_scale not in ("off", "current") else 1

    @property
    def format(self) -> BlockFormat:
        """The operands' blocks along a contraction."""
        return self._blocks(self.block)

    @property
    def tile_format(self) -> BlockFormat:
        """Weights in tiles: a tile laid out in a row is a block."""
        return self._blocks(self.block * self.block)

    def _blocks(self, block: int) -> BlockFormat:
        return BlockFormat(
            element=self.element,
            block=block,
            scale=self.scale,
            tensor_scale=self.scaled_by_tensor,
            scale_rule=self.scale_rule,
            scale_floor="one" if self.zero_scale == "one" else None,
            scale_target=self.scale_target if self.scaled_by_tensor else None,
        )

    def rotates(self, product: str) -> bool:
        return product in ROTATED[self.hadamard]

    def rotation_size(self, contraction: int) -> int:
        """Entries of a rotation along a contraction: the largest power of two that divides it, at most `hadamard_size`; 1 is none."""
        wanted = self.hadamard_size or self.block
        return math.gcd(contraction, wanted)

    @property
    def keeps_operands(self) -> bool:
        """Whether the backward pass needs X and W in full precision."""
        return self.casts and (self.estimator != "ste" or self.scale_gradient != "none")

    def operand_operations(self, operand: Operand, elements: int, rotation: int) -> float:
        """Elementwise operations of one cast, `rotation` the size of its Hadamard rotation (1: none)."""
        cost = float(CAST_COST)
        if self.scaled_by_tensor:
            cost += TENSOR_SCALE_COST / self.hold
        if operand in self.stochastic:
            cost += STOCHASTIC_COST
        if rotation > 1:
            cost += math.log2(rotation) + 1
        if operand == "x" and self.clamp is not None:
            cost += CLAMP_COST
        if operand in ("x", "w"):
            cost += ESTIMATOR_COST[self.estimator] + SCALE_GRADIENT_COST[self.scale_gradient]
        return cost * elements

    def overhead(self, M: int, K: int, N: int) -> Overhead:
        """What the casts of Y = X W^T and its two backward products cost, X [M, K], W [N, K].

        Examples:
            >>> FP4Recipe.preset("nvfp4").overhead(1024, 512, 512).relative
            0.0234375
        """
        check_whole(M=M, K=K, N=N)
        if not self.casts:
            return Overhead(0.0, 0.0, 4 * M * K)
        casts: tuple[tuple[Operand, int, str, int], ...] = (
            ("x", M * K, "forward", K), ("w", N * K, "forward", K),
            ("dy", M * N, "dgrad", N), ("w_dgrad", N * K, "dgrad", N),
            ("dy", M * N, "wgrad", M), ("x_wgrad", M * K, "wgrad", M),
        )  # fmt: skip
        operations = sum(
            self.operand_operations(operand, elements, self.rotation_size(along) if self.rotates(product) else 1)
            for operand, elements, product, along in casts
        )
        return Overhead(operations, operations / (2 * M * N * K), self.kept_bytes(M, K))

    def kept_bytes(self, M: int, K: int) -> int:
        """Bytes of X kept for the backward pass: its four-bit cast along M, or all of it; W is the parameter itself."""
        if self.keeps_operands or not self.pack_saved or not self.casts:
            return 4 * M * K
        element, blocks = ELEMENTS[self.element], K * -(-M // self.block)
        scale_bytes = {"fp32": 4, "bf16": 2}.get(self.scale, 1)
        return -(-M * K * element.bits // 8) + blocks * scale_bytes + (4 if self.scaled_by_tensor else 0)


_SR = frozenset({"dy"})
PRESETS: dict[str, dict[str, Any]] = {
    "mxfp4": {"scale": "e8m0", "block": 32, "tensor_scale": "off", "stochastic": frozenset()},
    "mxfp4-sr-rht": {"scale": "e8m0", "block": 32, "tensor_scale": "off", "stochastic": _SR, "hadamard": "backward"},
    "nvfp4": {"scale": "e4m3", "block": 16, "stochastic": _SR},
    "nvfp4-te": {"scale": "e4m3", "block": 16, "stochastic": _SR, "hadamard": "wgrad", "hadamard_size": 16, "weight_blocks": "2d"},
    "ue5m3": {"scale": "ue5m3", "block": 16, "stochastic": _SR},
    "paper": {"scale": "ue5m3", "block": 32, "stochastic": _SR, "hadamard": "backward"},
    "follow-up": {
        "scale": "ue5m3", "block": 16, "tensor_scale": 50, "stochastic": _SR, "sr_bits": 8, "weight_blocks": "2d", "zero_scale": "one",
    },
}  # fmt: skip
