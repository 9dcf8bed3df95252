"""A function as its few Walsh-Hadamard coefficients."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from fewer.signals.spright.bins.bits import Bits, pack, sum_of_parities


@dataclass(frozen=True, eq=False)
class SparseSpectrum:
    """f(m) = sum_k X[k] (-1)^<k,m> over the k that were found, the largest |X[k]| first.

    Call it with bit vectors [q, n] to get f there, float64 [q].

    Attributes:
        indices: the bit vectors k [K, n] uint8.
        values: X[k] [K] float64.
        stderr: standard errors of the values [K].
        queries: points of f that were asked, each once.
        residual_bins: bins that hold more than what was found.
        converged: every bin is explained and, where the noise had to be estimated, the spectrum (constant aside) has at least its energy.
        noise_std: sigma of a sample: as fitted, all that the spectrum leaves unexplained.

    Examples:
        >>> spectrum = SparseSpectrum(np.array([[1, 1]], dtype=np.uint8), np.array([2.0]), np.array([0.1]))
        >>> spectrum(np.array([[0, 0], [0, 1]], dtype=np.uint8))
        array([ 2., -2.])
        >>> spectrum.to_dict(), spectrum.interactions(["age", "dose"])
        ({'11': 2.0}, [(('age', 'dose'), 2.0)])
    """

    indices: Bits
    values: Float64[np.ndarray, "coefficients"]
    stderr: Float64[np.ndarray, "coefficients"]
    queries: int = 0
    residual_bins: int = 0
    converged: bool = True
    noise_std: float = 0.0

    @property
    def n(self) -> int:
        """Variables."""
        return self.indices.shape[1]

    def __len__(self) -> int:
        return len(self.values)

    def __call__(self, m: Bits) -> Float64[np.ndarray, "rows"]:
        """The function at bit vectors [q, n]; ValueError where they are no such."""
        return sum_of_parities(pack(as_bits(m, self.n)), pack(self.indices), self.values)

    def to_dict(self) -> dict[str, float]:
        """{bit string of k, first bit first: X[k]}."""
        return {"".join(map(str, k)): float(value) for k, value in zip(self.indices.tolist(), self.values, strict=True)}

    def top(self, k: int) -> SparseSpectrum:
        """The k largest coefficients alone."""
        return dataclasses.replace(self, indices=self.indices[:k], values=self.values[:k], stderr=self.stderr[:k])

    def order(self) -> Int64[np.ndarray, "coefficients"]:
        """How many variables each coefficient joins: its number of ones."""
        return self.indices.sum(axis=1, dtype=np.int64)

    def interactions(self, feature_names: Sequence[str]) -> list[tuple[tuple[str, ...], float]]:
        """(names of the variables joined, X[k]), the largest first; ValueError unless there is a name for each variable."""
        if len(feature_names) != self.n:
            raise ValueError(f"{len(feature_names)} feature names for {self.n} variables; expected one for each")
        names = np.asarray(feature_names, dtype=object)
        return [(tuple(names[k.astype(bool)]), float(value)) for k, value in zip(self.indices, self.values, strict=True)]

    def to_json(self) -> str:
        """The spectrum as JSON, numbers exact."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields |= {"indices": list(self.to_dict()), "values": self.values.tolist(), "stderr": self.stderr.tolist()}
        return json.dumps({"n": self.n} | fields)

    @classmethod
    def from_json(cls, text: str) -> SparseSpectrum:
        """The inverse of `to_json`; ValueError where the text is no such.

        >>> spectrum = SparseSpectrum(np.array([[1, 0]], dtype=np.uint8), np.array([0.1]), np.array([0.0]), queries=12)
        >>> SparseSpectrum.from_json(spectrum.to_json()).to_dict()
        {'10': 0.1}
        """
        try:
            fields: dict[str, Any] = json.loads(text)
            n, strings = fields.pop("n"), fields.pop("indices")
            indices = np.array([[int(bit) for bit in string] for string in strings], dtype=np.uint8).reshape(-1, n)
            values, stderr = (np.array(fields.pop(name), dtype=np.float64) for name in ("values", "stderr"))
            if not (len(indices) == len(values) == len(stderr) == len(strings)) or indices.max(initial=0) > 1:
                raise ValueError("indices, values and stderr do not fit each other")
            return cls(indices, values, stderr, **fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"the text is no spectrum ({error}); expected what SparseSpectrum.to_json wrote") from error


def as_bits(m: Any, n: int) -> Bits:
    """m as uint8 [q, n]; ValueError, naming what is wrong, unless it holds zeros and ones of that shape."""
    given = np.asarray(m)
    if given.ndim != 2 or given.shape[1] != n or given.dtype.kind not in "fiub":
        raise ValueError(f"m is {given.dtype} of shape {given.shape}; expected zeros and ones of shape (rows, {n}): one bit a variable")
    bits = given.astype(np.uint8)
    if bits.max(initial=0) > 1 or (given != bits).any():
        row = int(((given != bits) | (bits > 1)).any(axis=1).argmax())
        raise ValueError(f"m holds something other than 0 and 1 in row {row}; expected bits: binarise it, for example at each median")
    return bits
