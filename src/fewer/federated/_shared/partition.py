"""Splitting labelled examples over clients: alike (iid), by a Dirichlet draw a class, or a few classes a client.

Every split covers each example exactly once and depends on its seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fewer.checks import check_whole

REDRAWS = 1000

Parts = list[np.ndarray]


def iid(labels: Any, clients: int, seed: int = 0) -> Parts:
    """The examples shuffled and dealt out in equal parts (to within one).

    Args:
        labels: class numbers [N].
        clients: how many parts.
        seed: what the shuffle depends on.

    Returns:
        an index array a client.

    Examples:
        >>> [len(part) for part in iid([0] * 10, clients=3)]
        [4, 3, 3]
    """
    labels = _checked(labels, clients)
    return [np.sort(part) for part in np.array_split(np.random.default_rng(seed).permutation(len(labels)), clients)]


def dirichlet(labels: Any, clients: int, alpha: float, seed: int = 0, min_size: int = 10) -> Parts:
    """Each class is dealt out in shares drawn from Dirichlet(alpha, ..., alpha); redrawn until every client has `min_size` examples.

    Args:
        labels: class numbers [N].
        clients: how many parts.
        alpha: the concentration; small ones give each client few classes, large ones equal shares.
        seed: what the draw depends on.
        min_size: the fewest examples that a client may have.

    Returns:
        an index array a client.

    Raises:
        ValueError: alpha <= 0, or no draw in 1000 gave every client `min_size` examples.

    Examples:
        >>> parts = dirichlet([0, 1] * 50, clients=4, alpha=0.5, min_size=5)
        >>> sum(len(part) for part in parts), min(len(part) for part in parts) >= 5
        (100, True)
    """
    labels = _checked(labels, clients)
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha}; expected a positive concentration, such as 0.3 (smaller: more unlike clients)")
    check_whole(least=0, min_size=min_size)
    if min_size * clients > len(labels):
        raise ValueError(
            f"min_size is {min_size} for {clients} clients and {len(labels)} examples; expected at most {len(labels) // clients}"
        )
    rng = np.random.default_rng(seed)
    for _ in range(REDRAWS):
        parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for name in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == name))
            shares = rng.dirichlet(np.full(clients, alpha))
            cuts = np.round(np.cumsum(shares)[:-1] * len(rows)).astype(int)
            for part, piece in zip(parts, np.split(rows, cuts), strict=True):
                part.append(piece)
        joined = [np.sort(np.concatenate(part)) for part in parts]
        if min(map(len, joined)) >= min_size:
            return joined
    raise ValueError(
        f"no draw in {REDRAWS} gave each of {clients} clients {min_size} of {len(labels)} examples at alpha {alpha}; "
        "take fewer clients, a larger alpha or a smaller min_size"
    )


def pathological(labels: Any, clients: int, classes_per_client: int, seed: int = 0) -> Parts:
    """The examples sorted by class, cut into equal pieces, `classes_per_client` pieces a client: few classes each.

    Args:
        labels: class numbers [N].
        clients: how many parts.
        classes_per_client: pieces a client gets (a piece may span two classes where sizes do not divide).
        seed: what the deal depends on.

    Returns:
        an index array a client.

    Examples:
        >>> labels = np.repeat(np.arange(4), 10)
        >>> [len(np.unique(labels[part])) for part in pathological(labels, clients=4, classes_per_client=1)]
        [1, 1, 1, 1]
    """
    labels = _checked(labels, clients)
    check_whole(classes_per_client=classes_per_client)
    pieces = clients * classes_per_client
    if pieces > len(labels):
        raise ValueError(f"classes_per_client is {classes_per_client}; expected 1 to {len(labels) // clients} for {len(labels)} examples")
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    cut = np.array_split(shuffled[np.argsort(labels[shuffled], kind="stable")], pieces)
    dealt = rng.permutation(pieces).reshape(clients, classes_per_client)
    return [np.sort(np.concatenate([cut[piece] for piece in row])) for row in dealt]


@dataclass(frozen=True)
class Description:
    """How many examples of each class each client has: `counts` [clients, classes], `classes` their names."""

    counts: np.ndarray
    classes: np.ndarray

    def __str__(self) -> str:
        wide = max(6, len(str(self.counts.max())) + 1)
        head = "client " + "".join(f"{name!s:>{wide}}" for name in self.classes) + f"{'all':>{wide + 1}}"
        rows = [
            f"{client:>6} " + "".join(f"{n:>{wide}}" for n in row) + f"{row.sum():>{wide + 1}}" for client, row in enumerate(self.counts)
        ]
        return "\n".join([head, *rows])

    def heat_map(self) -> Any:
        """The counts as an Altair chart, clients across, classes down."""
        import altair

        cells = [
            {"client": client, "class": str(name), "examples": int(n)}
            for client, row in enumerate(self.counts)
            for name, n in zip(self.classes, row, strict=True)
        ]
        chart = altair.Chart(altair.Data(values=cells)).mark_rect()
        return chart.encode(x="client:O", y="class:O", color="examples:Q", tooltip=["client:O", "class:O", "examples:Q"])


def describe(labels: Any, parts: Sequence[np.ndarray]) -> Description:
    """The counts table of a split.

    Examples:
        >>> print(describe([0, 0, 1, 1], [[0, 1, 2], [3]]))
        client      0     1    all
             0      2     1      3
             1      0     1      1
    """
    labels = np.asarray(labels)
    classes = np.unique(labels)
    return Description(np.array([[(labels[np.asarray(part)] == name).sum() for name in classes] for part in parts]), classes)


def _checked(labels: Any, clients: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise ValueError(f"labels are {labels.shape}; expected one class number an example [N]")
    check_whole(clients=clients)
    if clients > len(labels):
        raise ValueError(f"clients is {clients}; expected 1 to {len(labels)}, the number of examples")
    return labels
