"""MeZO, which ZO2 reproduces bit for bit: z drawn again from a seed, three perturbations in place, one update.

Source: MeZO (princeton-nlp/MeZO, the trainer's `zo_step` and `zo_update`), as ZO2, arXiv 2503.12668, Algorithm 1 restates it. Floating
point does not come back exactly to theta after + eps z, - 2 eps z, + eps z: the order of the operations is part of the method.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fewer.checks import check_choice, check_not_negative, check_positive, check_whole

SEEDS = 10**9  # a step's seed is drawn from [0, SEEDS)
STORES, DTYPES = ("cpu", "disk", "none"), ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
DecayRule = Literal["mezo", "matrices"]


class StepResult(NamedTuple):
    """What a step found: the loss at theta + eps z (nats), the projected gradient (l1 - l2) / (2 eps), and the seed of z."""

    loss: float
    projected_grad: float
    seed: int


class Update(NamedTuple):
    """An update that is known and waits: theta -= lr g z for the z of a seed. A list of them is a journal."""

    seed: int
    g: float
    lr: float


@dataclass(frozen=True)
class ZO2Config:
    """How to fine-tune by forward passes alone.

    Attributes:
        lr: the learning rate; 1e-7 to 1e-5 for real models.
        eps: how far theta is moved along z for each of the two passes.
        weight_decay: of the parameters that `decay_rule` names; 0.1 in the released class.
        decay_rule: "mezo" leaves out names with bias, layer_norm, layernorm or ln in them, "matrices" whatever has fewer than two dimensions.
        store: where blocks live: "cpu" (host memory, for a GPU), "disk" (a directory), "none" (all stays on the device).
        store_dir: the directory of `store="disk"`; it takes twice the model.
        store_dtype: None keeps the blocks' own type; "float16", "bfloat16", "float8_e4m3fn" or "float8_e5m2" keeps them shorter, with one
            scale a block (then no longer bit-equal to MeZO).
        store_rounding: "nearest", which loses updates below half a step of the short type, or "stochastic", which keeps them in the mean.
        working_device: "auto" is the GPU where there is one.
        overlap: read the next block and write the last one while one computes; the bits are the same.
        cache_z: draw a block's z once for its three perturbations, in one block's memory; the bits are the same.
        rng: "torch" is the stream that MeZO draws from, "counter" depends on seed, name and element alone (several workers, any order).
        micro_batches: into how many parts a batch is cut; their losses are averaged before the projected gradient is taken.
        seed: what the steps' seeds are drawn from, each by its number.

    >>> ZO2Config(lr=1e-3, weight_decay=0.1).step_seed(0) == ZO2Config().step_seed(0) < 10**9
    True
    """

    lr: float = 1e-6
    eps: float = 1e-3
    weight_decay: float = 0.0
    decay_rule: DecayRule = "mezo"
    store: Literal["cpu", "disk", "none"] = "cpu"
    store_dir: str | None = None
    store_dtype: str | None = None
    store_rounding: Literal["nearest", "stochastic"] = "nearest"
    working_device: str = "auto"
    overlap: bool = True
    cache_z: bool = True
    rng: Literal["torch", "counter"] = "torch"
    micro_batches: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(eps=self.eps)
        check_not_negative(lr=self.lr, weight_decay=self.weight_decay)
        check_whole(micro_batches=self.micro_batches)
        check_whole(0, seed=self.seed)
        check_choice(("mezo", "matrices"), decay_rule=self.decay_rule)
        check_choice(STORES, store=self.store)
        check_choice(("nearest", "stochastic"), store_rounding=self.store_rounding)
        check_choice(("torch", "counter"), rng=self.rng)
        check_choice((None, *DTYPES), store_dtype=self.store_dtype)
        if self.store == "disk" and not self.store_dir:
            raise ValueError("store is 'disk' and store_dir is not given; expected the directory for the blocks: name a new one")
        if self.store == "none" and self.store_dtype:
            raise ValueError(f"store_dtype is {self.store_dtype!r} and store 'none'; expected a store that keeps blocks: 'cpu' or 'disk'")

    def step_seed(self, step: int) -> int:
        """The seed of a step's z, the same after a crash: it depends on `seed` and the step's number alone."""
        return random.Random(f"{self.seed} {step}").randrange(SEEDS)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, words: Mapping[str, Any]) -> ZO2Config:
        """The config of such data; ValueError where they are none."""
        try:
            return cls(**words)
        except TypeError as error:
            raise ValueError(f"{dict(words)} is no ZO2Config ({error}); expected what its to_dict wrote") from error


WALK = (1, -2, 1)  # theta + eps z, theta - eps z, theta
NO_DECAY = ("bias", "layer_norm", "layernorm", "ln")  # anywhere in the full name


def perturb_(theta: Float[Tensor, "..."], z: Float[Tensor, "..."], scaling: int, eps: float) -> None:
    """theta += scaling z eps, in this order."""
    theta.add_(z.mul(scaling).mul_(eps))


def update_(theta: Float[Tensor, "..."], z: Float[Tensor, "..."], g: float, lr: float, decay: float | None) -> None:
    """theta -= lr (g z + decay theta); without decay (None) theta -= (lr g) z, the two numbers multiplied first: other bits."""
    if decay is None:
        theta.sub_(z.mul(lr * g))
    else:
        step = z.mul(g)
        theta.sub_((step.add_(theta.mul(decay)) if decay else step).mul_(lr))


def decays(name: str, theta: Tensor, rule: DecayRule) -> bool:
    """Whether a parameter is decayed.

    >>> [decays(name, torch.ones(2), "mezo") for name in ("model.norm.weight", "layers.0.input_layernorm.weight")]
    [True, False]
    """
    return theta.ndim >= 2 if rule == "matrices" else not any(word in name for word in NO_DECAY)


class TorchDraws:
    """The stream that `torch.manual_seed(seed)` gives on a device; its state walks from parameter to parameter and can be rewound."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)

    def draw(self, name: str, like: Tensor) -> Tensor:
        return torch.normal(0.0, 1.0, like.shape, generator=self.generator, device=like.device, dtype=like.dtype)

    def mark(self) -> Tensor | None:
        return self.generator.get_state()

    def rewind(self, mark: Tensor | None) -> None:
        assert mark is not None
        self.generator.set_state(mark)


class CounterDraws:
    """z of a parameter as a function of (seed, its full name, element): no order, no device and no sharding changes it."""

    def __init__(self, seed: int, device: torch.device | None = None) -> None:
        self.seed = seed

    def draw(self, name: str, like: Tensor) -> Tensor:
        return counter_normal(self.seed, name, like.numel()).reshape(like.shape).to(like.device, like.dtype)

    def mark(self) -> Tensor | None:
        return None

    def rewind(self, mark: Tensor | None) -> None: ...


DRAWS = {"torch": TorchDraws, "counter": CounterDraws}
Draws = TorchDraws | CounterDraws
WORDS = 4  # of 64 bits, that Philox makes at a counter's value


def counter_normal(seed: int, name: str, count: int, first: int = 0) -> Float[Tensor, "count"]:
    """Elements first .. first + count - 1 of a parameter's z, float64: Philox-4x64 keyed by seed and name, the counter at the element.

    Each 64 bits make one number by Box and Muller's transform.

    >>> bool((counter_normal(1, "w", 9)[5:] == counter_normal(1, "w", 4, first=5)).all())
    True
    """
    key = [seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")]
    begin = first // WORDS
    words = np.random.Philox(key=np.array(key, np.uint64), counter=begin).random_raw(first + count - begin * WORDS)[first - begin * WORDS :]
    u = ((words >> np.uint64(32)) + 1.0) / 2.0**32  # in (0, 1]
    v = (words & np.uint64(0xFFFFFFFF)) / 2.0**32
    return torch.from_numpy(np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v))


class Trained:
    """Parameters that are trained, in the order in which their z is drawn, with the rule of their update.

    Args:
        parameters: (full name, tensor).
        config: eps, weight decay and its rule, whether z is kept.
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], config: ZO2Config) -> None:
        self.parameters, self.config = list(parameters), config

    def update_(self, draws: Draws, update: Update) -> None:
        """The update of a seed, its z drawn again."""
        for name, theta in self.parameters:
            decay = self.config.weight_decay if decays(name, theta, self.config.decay_rule) else None
            update_(theta.data, draws.draw(name, theta), update.g, update.lr, decay)

    def perturbations(self, draws: Draws) -> Callable[[int], None]:
        """A function to be called with 1, -2 and 1; z is drawn once and kept, or the stream is rewound before each."""
        mark, kept = draws.mark(), list[Tensor]()

        def perturb(scaling: int) -> None:
            if not kept:
                draws.rewind(mark)
            for place, (name, theta) in enumerate(self.parameters):
                z = kept[place] if len(kept) == len(self.parameters) else draws.draw(name, theta)
                perturb_(theta.data, z, scaling, self.config.eps)
                if self.config.cache_z and len(kept) < len(self.parameters):
                    kept.append(z)

        return perturb


def projected_gradient(difference: Tensor, eps: float) -> float:
    """(l1 - l2) / (2 eps), taken on the loss tensors in their own precision."""
    return (difference / (2 * eps)).item()


def over_workers(difference: Tensor, group: Any) -> Tensor:
    """The mean of l1 - l2 over the workers of a torch.distributed group: one number goes round."""
    if group is None:
        return difference
    import torch.distributed as dist

    dist.all_reduce(difference, group=group)
    return difference / dist.get_world_size(group)


def checked_loss(loss: Any, step: int, seed: int) -> Tensor:
    """The loss as a float32 (or float64) scalar; ValueError naming step and seed where it is no finite scalar."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not math.isfinite(loss.item()):
        found = f"{loss.item()}" if isinstance(loss, Tensor) and loss.numel() == 1 else f"a {type(loss).__name__}"
        shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) and loss.numel() != 1 else ""
        raise ValueError(
            f"the loss of step {step} (seed {seed}) is {found}{shape}; expected a finite scalar, nothing is updated: look at the batch, or lower lr"
        )
    loss = loss.detach().reshape(())
    return loss if loss.dtype == torch.float64 else loss.float()


class MeZO(torch.optim.Optimizer):
    """MeZO's step, the reference: everything in memory, z drawn four times.

    Args:
        params: `model.named_parameters()`: the decay rule "mezo" goes by full names.
        lr, eps, weight_decay, decay_rule, seed: as in `ZO2Config`.

    Attributes:
        last: the StepResult of the last step.

    Raises:
        ValueError: a number that cannot be, nothing to train, or no names where the decay rule needs them.

    Examples:
        >>> layer = torch.nn.Linear(3, 1)
        >>> optimizer = MeZO(layer.named_parameters(), lr=1e-2)
        >>> loss = optimizer.step(lambda: layer(torch.ones(1, 3)).square().sum())
        >>> float(loss) == optimizer.last.loss
        True
    """

    last: StepResult

    def __init__(
        self,
        params: Any,
        lr: float = 1e-6,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        decay_rule: DecayRule = "mezo",
        seed: int = 0,
    ) -> None:
        ZO2Config(lr, eps, weight_decay, decay_rule, store="none", seed=seed)
        words = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "decay_rule": decay_rule, "seed": seed, "step": 0}
        super().__init__(params, words)
        if not any(each.requires_grad for group in self.param_groups for each in group["params"]):
            raise ValueError("no parameter requires a gradient; expected some to train: unfreeze them")
        for group in self.param_groups:
            if "param_names" not in group and group["weight_decay"] and group["decay_rule"] == "mezo":
                raise ValueError("the parameters have no names, by which MeZO decays them; expected model.named_parameters()")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, seed: int | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step: two calls of the closure, which returns the loss of the model in eval mode; the first loss is returned."""
        if closure is None:
            raise ValueError("step() was given no closure; expected one that returns the loss: optimizer.step(lambda: model(...).loss)")
        first = self.param_groups[0]
        number, eps = first["step"], first["eps"]
        seed = ZO2Config(seed=first["seed"]).step_seed(number) if seed is None else seed
        groups = [(self._trained(group), group["lr"]) for group in self.param_groups]

        def perturb(scaling: int) -> None:
            draws = TorchDraws(seed, first["params"][0].device)
            for trained, _ in groups:
                trained.perturbations(draws)(scaling)

        losses, moved = [], 0
        try:
            for scaling in WALK[:2]:
                perturb(scaling)
                moved += scaling
                losses.append(closure())
        finally:
            perturb(-moved)  # + 1, or back from wherever the closure raised
        checked = [checked_loss(loss, number, seed) for loss in losses]
        g = projected_gradient(checked[0] - checked[1], eps)
        draws = TorchDraws(seed, first["params"][0].device)
        for trained, lr in groups:
            trained.update_(draws, Update(seed, g, lr))
        for group in self.param_groups:
            group["step"] += 1
        self.last = StepResult(checked[0].item(), g, seed)
        return checked[0]

    def _trained(self, group: dict[str, Any]) -> Trained:
        names = group.get("param_names") or [""] * len(group["params"])
        config = ZO2Config(group["lr"], group["eps"], group["weight_decay"], group["decay_rule"], store="none", cache_z=False)
        return Trained(((name, each) for name, each in zip(names, group["params"], strict=True) if each.requires_grad), config)
