"""The verb `fewer wht`: the largest coefficients of an array in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fewer.checks import check_whole

if TYPE_CHECKING:
    from fewer.signals.spright import SparseSpectrum


def wht(
    file: Annotated[Path, typer.Argument(help="An .npy file: a real array of length 2^n.")],
    top: Annotated[int, typer.Option(min=1, help="How many coefficients to print.")] = 20,
    design: Annotated[Literal["so", "nso", "none"], typer.Option(help="so or nso for arrays with noise, none for exact ones.")] = "so",
    max_queries: Annotated[int | None, typer.Option(min=1, help="Entries to read at most; 100,000.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Chooses the entries.")] = 0,
    full: Annotated[bool, typer.Option("--full", help="Read every entry and make the full transform.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The largest Walsh-Hadamard coefficients of an array of length 2^n: x[m] = sum_k X[k] (-1)^<k,m>.

    The file is mapped and few of its entries are read, which finds the coefficients where few matter. Bits are written highest first.

    Example: fewer wht truth_table.npy --top 20
    """
    check_whole(optional=(), **{"--top": top})
    from fewer.inputs import map_array
    from fewer.signals.spright.bins.queries import ArrayFunction
    from fewer.signals.spright.recovery import sparse_wht

    f = ArrayFunction(map_array(file, "an array of length 2^n"))
    if f.n < 1:
        raise ValueError(f"{file} holds a single number; expected an array of length 2, 4, 8, ...")
    spectrum = _full(f, top) if full else sparse_wht(f, f.n, design=design, max_queries=max_queries, seed=seed)
    shown = spectrum.top(top)
    if as_json:
        coefficients = [
            {"bits": bits, "value": value, "stderr": stderr}
            for (bits, value), stderr in zip(shown.to_dict().items(), shown.stderr.tolist(), strict=True)
        ]
        told = {"n": f.n, "queries": spectrum.queries, "converged": spectrum.converged, "residual_bins": spectrum.residual_bins}
        print(json.dumps(told | {"noise_std": spectrum.noise_std, "coefficients": coefficients}))
        return
    for (bits, value), stderr in zip(shown.to_dict().items(), shown.stderr, strict=True):
        print(f"{bits}  {value:+.6g}" + ("" if full else f"  +- {stderr:.2g}"))
    print(f"{len(shown)} of {len(spectrum)} coefficients, from {spectrum.queries:,} of {2**f.n:,} entries")
    if not spectrum.converged:
        print(
            f"not all is explained: {spectrum.residual_bins} bins hold more, and noise of standard deviation {spectrum.noise_std:.3g} "
            "an entry is left; more is found with a larger --max-queries, all with --full"
        )


COMMANDS = {"wht": wht}


def _full(f: object, top: int) -> SparseSpectrum:
    """The largest coefficients of the full transform, as a spectrum."""
    import numpy as np

    from fewer.signals.spright.bins.bits import unpack
    from fewer.signals.spright.bins.queries import ArrayFunction, check_answer
    from fewer.signals.spright.spectrum import SparseSpectrum
    from fewer.signals.spright.transform import fwht

    assert isinstance(f, ArrayFunction)
    transform = fwht(check_answer(f.array, len(f.array), 0))
    largest = np.argsort(-np.abs(transform), kind="stable")[:top]
    indices = unpack(largest.astype(np.uint64)[:, None] << np.uint64(64 - f.n), f.n)
    return SparseSpectrum(indices, transform[largest], np.zeros(len(largest)), queries=2**f.n)
