"""What to train: shares of heads and channels, how they are chosen, and how the trained part is kept."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fewer.checks import check_whole, is_number
from fewer.language._shared.structure import AUTO, Kind

Ways = Literal["random", "weight", "activation", "product", "gradient"]
Order = Literal["smallest", "largest"]
Layout = Literal["permuted", "gather"]
CALIBRATED = ("activation", "product", "gradient")


@dataclass(frozen=True)
class S2FTConfig:
    """S2FT's settings.

    Args:
        o_ratio, d_ratio: shares of query heads whose columns of o_proj, and of channels whose columns of down_proj, are trained.
            The release trains o 0.052 and d 0.02 of Llama-2, and d 0.03 alone of Llama-3, which is the default.
        v_ratio, u_ratio: shares of key/value heads whose rows of v_proj, and of channels whose rows of up_proj, are trained. They need a
            layer's whole input for their gradient, so they save less.
        selection: "random" (S2FT-R), or by "weight", "activation", their "product", or "gradient"; the last three want calibration.
        order: whether the smallest or the largest scores are trained.
        per_layer: equal shares in every layer, in place of one ranking (or one draw) over all layers together.
        layout: "permuted" makes the trained channels neighbours, and the trained part a view into the weight; "gather" leaves the weights
            in their order. Attention is always gathered: with grouped queries no legal permutation makes any selection of heads neighbours.
        in_place: train inside the weight. False keeps the trained part beside it (a second, thin product), which quantised or sharded
            weights need.
        seed: of the random selection.
        target_families: "auto", or the families that may be taken: "gated" (Llama, Mistral, Qwen2, Gemma), "opt", "gpt2".

    Raises:
        ValueError: a ratio outside [0, 1], none above 0, or a word that is not known.

    Examples:
        >>> config = S2FTConfig(d_ratio=0.02, o_ratio=0.052)
        >>> S2FTConfig.from_json(config.to_json()) == config
        True
    """

    o_ratio: float = 0.0
    d_ratio: float = 0.03  # released for Llama-3
    v_ratio: float = 0.0
    u_ratio: float = 0.0
    selection: Ways = "random"
    order: Order = "smallest"
    per_layer: bool = False
    layout: Layout = "permuted"
    in_place: bool = True
    seed: int = 0
    target_families: str | Sequence[str] = AUTO

    def __post_init__(self) -> None:
        for kind, ratio in self.ratios.items():
            if not is_number(ratio) or not 0 <= ratio <= 1:
                raise ValueError(f"{kind}_ratio is {ratio}; expected a share between 0 and 1")
        if not any(self.ratios.values()):
            raise ValueError("all of v_ratio, o_ratio, u_ratio and d_ratio are 0; expected one above 0, such as d_ratio=0.03")
        for name, known in (("selection", Ways), ("order", Order), ("layout", Layout)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(get_args(known))}")
        check_whole(least=0, seed=self.seed)
        if self.seed >= 2**60:  # four streams of random numbers come from it
            raise ValueError(f"seed is {self.seed}; expected a whole number below 2**60")
        for name in ("per_layer", "in_place"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected True or False")
        if not isinstance(self.target_families, str):
            object.__setattr__(self, "target_families", tuple(self.target_families))

    @property
    def ratios(self) -> dict[Kind, float]:
        """The four shares by kind: v, o, u, d."""
        return {"v": self.v_ratio, "o": self.o_ratio, "u": self.u_ratio, "d": self.d_ratio}

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> S2FTConfig:
        """The settings that `to_json` wrote; ValueError where a word is not known."""
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> S2FTConfig:
        known = {field.name for field in dataclasses.fields(cls)}
        if set(given) - known:
            raise ValueError(f"unknown settings {', '.join(sorted(set(given) - known))}; expected some of {', '.join(sorted(known))}")
        return cls(**given)
