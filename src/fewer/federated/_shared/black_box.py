"""Black boxes in the place of models and examples: a point in the place of a model's parameters, a function in the place of a client's data.

The engines and Flower's apps know neither; they move vectors. Everything is float64.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from fewer import meters

Function = Callable[[np.ndarray], float]
"""What a client minimises: a point [d] to a number."""
SHOWN = 4  # entries of a point that an error shows


class Point:
    """Where the search starts: what `FlatModel` is to a model.

    Args:
        x0: a point [d].

    Raises:
        ValueError: the point is not a vector of finite numbers.

    Examples:
        >>> Point([0.5, 0.5]).size
        2
    """

    dtype, averages_buffers = torch.float64, False

    def __init__(self, x0: Any) -> None:
        self.x0 = torch.tensor(np.asarray(x0, dtype=np.float64))
        if self.x0.ndim != 1 or not len(self.x0):
            raise ValueError(f"x0 has the shape {tuple(self.x0.shape)}; expected a vector [d] of at least one number")
        if not self.x0.isfinite().all():
            raise ValueError("x0 holds NaN or infinite numbers; expected finite ones")
        self.size = len(self.x0)

    def initial(self) -> Float64[Tensor, "d"]:
        return self.x0.clone()

    def state_dict(self, vector: Float64[Tensor, "d"]) -> dict[str, Tensor]:
        return {"x": vector.clone()}


class BlackBoxes:
    """A function a client: what `Shards` is to examples. Client ids are 0, 1, ...

    Raises:
        ValueError: there is none.
        TypeError: one cannot be called.
    """

    def __init__(self, functions: Sequence[Function]) -> None:
        if not len(functions):
            raise ValueError("no functions were given; expected one a client")
        for client, function in enumerate(functions):
            if not callable(function):
                raise TypeError(f"the function of client {client} is a {type(function).__name__}; expected a callable of a point [d]")
        self.functions = list(functions)

    def __len__(self) -> int:
        return len(self.functions)

    def shard(self, client: int, flat: Any, steps: int | None = None) -> BlackBox:
        """What `local` sees of a client, whose algorithm alone says how many steps it makes."""
        return BlackBox(client, flat, self.functions[client])


class BlackBox:
    """One client's function; each call is counted as a query.

    Attributes:
        client: its id.
        size: 1: clients weigh alike.
    """

    size = 1

    def __init__(self, client: int, flat: Any, function: Function) -> None:
        self.client, self.flat, self.function = client, flat, function

    def ask(self, point: Float64[Tensor, "d"]) -> float:
        """The function's value at a point.

        Raises:
            ValueError: it gives no finite number.
        """
        meters.count("queries")
        given = point.numpy().copy()  # the function may write into what it is given
        value = self.function(given)
        if isinstance(value, np.ndarray | Tensor) and value.ndim == 0:
            value = value.item()
        if not isinstance(value, numbers.Real) or not np.isfinite(float(value)):
            shown = ", ".join(f"{number:.4g}" for number in point[:SHOWN].tolist()) + (", ..." if len(point) > SHOWN else "")
            said = f"an array of shape {np.shape(value)}" if isinstance(value, np.ndarray | Tensor | list) else repr(value)
            raise ValueError(f"the function of client {self.client} gives {said} at [{shown}]; expected one finite number")
        return float(value)
