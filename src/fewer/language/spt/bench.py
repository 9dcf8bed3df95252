"""Races: a routed network against LoRA's dense one, sparse attention against eager and fused attention, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

from fewer.language.spt.study import attention_of, backward_of, heads, kept_bytes, layer_pair
from fewer.meters import count_flops
from fewer.study import Bench

bench = Bench("spt")
Work = Callable[[], object]


@bench.race(
    "a feed-forward network, forward and backward, 1,024 tokens of SmolLM2's shapes", peer="peft's LoRA on the dense network", reach=1 / 1.6
)
def networks() -> tuple[Work, Work]:
    routed, dense, x = layer_pair()
    return backward_of(routed, x), backward_of(dense, x)


@bench.quantity("operations of the network", peer="peft's LoRA on the dense network", unit="FLOP", reach=0.6)
def operations() -> tuple[float, float]:
    routed, dense, x = layer_pair()
    totals = []
    for network in (routed, dense):
        with count_flops() as flops:
            network(x.detach())
        totals.append(float(flops.total))
    return totals[0], totals[1]


def _attention(tokens: int, peer: str) -> tuple[Work, Work]:
    ours, theirs = (backward_of(attention_of(kind), *heads(tokens)) for kind in ("spt", peer))
    return ours, theirs


@bench.race("attention, forward and backward, 2,048 tokens, 9 heads", peer="eager attention", reach=1.0)
def against_eager() -> tuple[Work, Work]:
    return _attention(2048, "eager")


@bench.race("attention, forward and backward, 2,048 tokens, 9 heads", peer="fused attention (torch)")
def against_fused() -> tuple[Work, Work]:
    return _attention(2048, "sdpa")


@bench.quantity("bytes that attention keeps for its backward pass, 1,024 tokens", peer="eager attention", unit="bytes", reach=0.25)
def bytes_kept() -> tuple[float, float]:
    return kept_bytes(attention_of("spt"), *heads()), kept_bytes(attention_of("eager"), *heads())


@bench.quantity("bytes that attention keeps for its backward pass, 1,024 tokens", peer="fused attention (torch)", unit="bytes")
def bytes_against_fused() -> tuple[float, float]:
    return kept_bytes(attention_of("spt"), *heads()), kept_bytes(attention_of("sdpa"), *heads())


@bench.quantity("bytes that the network keeps, 1,024 tokens", peer="peft's LoRA on the dense network", unit="bytes", reach=1.0)
def network_bytes() -> tuple[float, float]:
    routed, dense, x = layer_pair()
    return kept_bytes(routed, x), kept_bytes(dense, x)
