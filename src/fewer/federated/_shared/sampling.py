"""Who takes part in a round; the draw depends on the seed, the round and who is there, on nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fewer.federated._shared.clients import sampling_rng

Sampler = Callable[[Sequence[int], int, int], list[int]]
"""`sampler(client_ids, round, seed)`: those that take part."""


@dataclass(frozen=True)
class Independent:
    """Each client takes part with the same probability, independently of the others; redrawn if none does.

    Raises:
        ValueError: the fraction is not in (0, 1].

    Examples:
        >>> Independent(1.0)([3, 1, 2], 1, 0)
        [1, 2, 3]
    """

    fraction: float

    def __post_init__(self) -> None:
        check_fraction(self.fraction)

    def __call__(self, client_ids: Sequence[int], round: int, seed: int) -> list[int]:
        rng, ids = sampling_rng(seed, round), sorted(client_ids)
        while ids:
            if (drawn := rng.random(len(ids)) < self.fraction).any():
                return [client for client, chosen in zip(ids, drawn, strict=True) if chosen]
        return []


@dataclass(frozen=True)
class FixedSize:
    """The same number of clients each round: that fraction of them, at least one.

    Raises:
        ValueError: the fraction is not in (0, 1].

    Examples:
        >>> len(FixedSize(0.2)(range(50), 1, 0))
        10
    """

    fraction: float

    def __post_init__(self) -> None:
        check_fraction(self.fraction)

    def __call__(self, client_ids: Sequence[int], round: int, seed: int) -> list[int]:
        ids = sorted(client_ids)
        if not ids:
            return []
        return sorted(sampling_rng(seed, round).choice(ids, size=max(1, round_half_up(self.fraction * len(ids))), replace=False).tolist())


def choose(sampler: Sampler, client_ids: Iterable[int], round: int, seed: int) -> list[int]:
    """Those that take part in a round, each once however often the sampler says it, in its order.

    Raises:
        ValueError: the sampler chose nobody, or somebody who is not there.
    """
    ids = list(client_ids)
    chosen = list(dict.fromkeys(int(client) for client in sampler(ids, round, seed)))
    if not chosen:
        raise ValueError(f"the sampler chose no client in round {round}; expected at least one of {len(ids)}")
    if strangers := set(chosen) - set(ids):
        raise ValueError(f"the sampler chose client {min(strangers)} in round {round}; expected some of the {len(ids)} that are there")
    return chosen


def round_half_up(number: float) -> int:
    return int(number + 0.5)


def check_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"the fraction of clients is {fraction}; expected more than 0 and at most 1, such as 0.1")
