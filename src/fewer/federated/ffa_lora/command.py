"""The verb `fewer federated privacy`: the noise for a budget, and what is spent over the rounds."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from fewer.checks import check_positive, check_share

POINTS = (1, 2, 5, 10, 20, 50, 100)  # shares of the rounds in percent, at which what is spent is told


def privacy(
    examples: Annotated[list[int], typer.Option(min=1, help="How many examples a client has; once for each client.")],
    rounds: Annotated[int, typer.Option(min=1, help="The most rounds that a client takes part in.")],
    batch: Annotated[int, typer.Option(min=1, help="Examples that a step draws on average.")] = 200,
    steps: Annotated[int, typer.Option(min=1, help="Local steps a round.")] = 10,
    epsilon: Annotated[float, typer.Option(min=0, help="The budget over all rounds.")] = 6.0,
    delta: Annotated[float, typer.Option(min=0, max=1, help="Of (epsilon, delta); below one over the number of examples.")] = 1e-5,
    prv: Annotated[bool, typer.Option("--prv", help="Account numerically (tighter, slower) in place of Renyi's way.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The noise multiplier sigma that keeps a client's budget, and the epsilon that it has spent after some and after all rounds.

    Example: fewer federated privacy --examples 22450 --batch 200 --rounds 1000 --steps 10 --epsilon 6
    """
    check_positive(**{"--epsilon": epsilon})
    check_share(ends=False, **{"--delta": delta})
    if fewest := [count for count in examples if count < batch]:
        raise ValueError(f"--batch is {batch} and a client has {min(fewest)} examples; expected at most that many: a smaller --batch")
    from fewer.federated.ffa_lora.accounting import epsilon_spent, noise_multiplier

    accountant = "prv" if prv else "rdp"
    at = sorted({max(1, round(rounds * point / 100)) for point in POINTS})
    told = []
    for count in examples:
        q = batch / count
        sigma = noise_multiplier(epsilon, delta, q, rounds * steps, accountant)
        spent = {after: epsilon_spent(sigma, delta, q, after * steps, accountant) for after in at}
        told.append({"examples": count, "q": q, "sigma": sigma, "delta": delta, "epsilon": spent, "delta_too_large": delta >= 1 / count})
    if as_json:
        print(json.dumps(told, indent=2))
        return
    for each in told:
        print(f"{each['examples']} examples: q {each['q']:.5g}, sigma {each['sigma']:.4g}, delta {delta:g}")
        for after, spent in each["epsilon"].items():
            print(f"  after {after:>6} rounds  epsilon {spent:.3g}")
        if each["delta_too_large"]:
            print(f"  delta is not below 1/{each['examples']}: the guarantee allows one example to be told outright; a smaller --delta")


ACTIONS = {"privacy": privacy}
