"""When a feed-forward block is left out: the settings, which travel as a JSON file beside the model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fewer.checks import check_choice, check_share, check_whole, is_number, is_whole
from fewer.files import read_json, whole_file

Mode = Literal["adaptive", "static", "random", "layers", "off"]
Counts = Literal["generated", "position"]


@dataclass(frozen=True)
class FFNSkipConfig:
    """Which tokens leave out which feed-forward blocks.

    Args:
        cold_start, cold_end: layers [0, cold_start) and [cold_end, L) always run in full.
        threshold: theta. A token starts to skip after the first layer between them whose similarity (-1 to 1) is at least this; above 1
            nobody skips, at -1 everybody after the first layer.
        max_skips: k, how many layers a token then skips; None is all up to `cold_end`.
        warmup_tokens: how many decoding steps run in full before anybody skips. The paper finds 25 to 30 enough.
        warmup_counts: whether these are counted from the first pass after the prompt ("generated"), or are positions of the text, prompt
            and all ("position").
        skip_prefill: let tokens of the prompt skip as well. By "generated" all of them may, by "position" those after the warm-up.
        mode: "adaptive" is the method. What it is held against: "static" leaves out the FFNs of `static_layers` for every token, "random"
            each between the cold regions with probability `p`, "layers" all of `static_layers`, attention too; "off" nothing.
        static_layers: see `mode`; inside the window.
        p: see `mode`.
        seed: of "random", whose draws follow from seed, token, position and layer alone.
        rearm: a token that has skipped `max_skips` layers is watched again from the next layer on.
        num_layers: L of the model that this was made for; None is any.

    Raises:
        ValueError: a window that is none, a negative count, a share outside [0, 1], a threshold that is no number, an unknown word.

    Examples:
        >>> config = FFNSkipConfig(cold_start=2, cold_end=6, threshold=0.97)
        >>> FFNSkipConfig.from_dict(config.to_dict()) == config
        True
    """

    cold_start: int
    cold_end: int
    threshold: float
    max_skips: int | None = None
    warmup_tokens: int = 25  # the ablation: 25 to 30 tokens saturate
    warmup_counts: Counts = "generated"
    skip_prefill: bool = False
    mode: Mode = "adaptive"
    static_layers: tuple[int, ...] = ()
    p: float = 0.0
    seed: int = 0
    rearm: bool = False
    num_layers: int | None = None

    def __post_init__(self) -> None:
        counts = ("cold_start", "cold_end", "warmup_tokens", "seed", "max_skips", "num_layers")
        check_whole(0, optional=["max_skips", "num_layers"], **{name: getattr(self, name) for name in counts})
        check_share(p=self.p)
        check_choice(get_args(Mode), mode=self.mode)
        check_choice(get_args(Counts), warmup_counts=self.warmup_counts)
        if not is_number(self.threshold):
            raise ValueError(f"threshold is {self.threshold!r}; expected a finite number, -1 to 1 (above 1 nobody skips)")
        for name in ("skip_prefill", "rearm"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected True or False")
        if self.cold_start >= self.cold_end:
            raise ValueError(
                f"cold_start {self.cold_start} and cold_end {self.cold_end} leave no layer between them; expected cold_start < cold_end"
            )
        self._check_static_layers()
        if self.num_layers is not None:
            self.check_layers(self.num_layers)

    def _check_static_layers(self) -> None:
        given: Any = self.static_layers
        if isinstance(given, str) or not isinstance(given, Iterable) or not all(map(is_whole, given)):
            raise ValueError(f"static_layers is {given!r}; expected numbers of layers, such as (3, 4)")
        object.__setattr__(self, "static_layers", tuple(sorted({int(each) for each in given})))
        outside = [each for each in self.static_layers if not self.cold_start <= each < self.cold_end]
        if outside:
            raise ValueError(f"static_layers holds {outside[0]}; expected layers from {self.cold_start} to {self.cold_end - 1}, the window")
        if self.mode == "layers" and 0 in self.static_layers:
            raise ValueError("static_layers holds 0 in mode 'layers'; expected 1 or more: the cache's length is read from layer 0")

    def check_layers(self, layers: int) -> None:
        """ValueError where this does not fit a model of so many layers."""
        if self.num_layers is not None and self.num_layers != layers:
            raise ValueError(f"the settings are for {self.num_layers} layers and the model has {layers}; calibrate them on this model")
        if self.cold_end > layers:
            raise ValueError(f"cold_end is {self.cold_end}; expected at most {layers}, the number of layers")

    @classmethod
    def off(cls) -> FFNSkipConfig:
        """Nothing is skipped: the full model, with the same interface."""
        return cls(0, 1, threshold=1.0, mode="off")

    @property
    def skips(self) -> bool:
        """Whether anything is ever left out or watched."""
        return self.mode != "off" and self.max_skips != 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as JSON has them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> FFNSkipConfig:
        """The settings of `to_dict`; ValueError where a name is unknown or missing."""
        fields = dataclasses.fields(cls)
        unknown = sorted(set(given) - {field.name for field in fields})
        missing = [field.name for field in fields if field.default is dataclasses.MISSING and field.name not in given]
        if unknown or missing:
            wrong = f"unknown settings {', '.join(unknown)}" if unknown else f"no {', '.join(missing)}"
            raise ValueError(f"{wrong}; expected some of {', '.join(field.name for field in fields)}: calibrate anew")
        return cls(**given)

    def save(self, file: str | Path, overwrite: bool = False, *, inputs: Iterable[str | Path] = ()) -> Path:
        """Write a JSON file, whole or not at all; FileExistsError where something stands there."""
        with whole_file(file, overwrite, inputs=inputs) as part:
            part.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf8")
        return Path(file)

    @classmethod
    def load(cls, file: str | Path) -> FFNSkipConfig:
        """Read what `save` wrote; ValueError or FileNotFoundError naming the file and the reason where it is none."""
        given = read_json(file)
        try:
            return cls.from_dict(given)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
