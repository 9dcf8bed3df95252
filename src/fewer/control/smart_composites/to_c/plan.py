"""Where every value of a network lives: the caller's arrays, or a place in one arena that values share when they are not alive together."""

from __future__ import annotations

from dataclasses import dataclass

from fewer.control.smart_composites.to_c.network import Layer, Network


@dataclass(frozen=True)
class Plan:
    """The places, as C expressions.

    Attributes:
        place: value -> its C expression.
        scratch: the output of a recurrent layer -> the C expression of its scratch.
        arena: numbers that the arena holds.
    """

    place: dict[str, str]
    scratch: dict[str, str]
    arena: int


def scratch_size(layer: Layer) -> int:
    """Numbers that a recurrent layer needs beside its state: the gates' sums."""
    gates = {"rnn": 2, "gru": 6, "lstm": 8}.get(layer.kind, 0)
    return gates * layer.weights["weight_hh"].shape[1] if gates else 0


def plan_buffers(network: Network) -> Plan:
    """First fit, largest first, over the layers at which values are alive."""
    root = {network.input: network.input}
    for layer in network.layers:
        root[layer.output] = root[layer.inputs[0]] if layer.kind == "alias" else layer.output
    born, dies, sizes = {}, {}, {}
    for time, layer in enumerate(network.layers):
        if layer.kind != "alias":
            born[layer.output], dies[layer.output], sizes[layer.output] = time, time, layer.size
        for value in layer.inputs:
            dies[root[value]] = time
        if scratch_size(layer):
            name = f"scratch of {layer.output}"
            born[name], dies[name], sizes[name] = time, time, scratch_size(layer)
    fixed = {network.input: "in", root[network.output]: "out"}
    fixed[network.input] = "in"
    wanted = sorted((name for name in sizes if name not in fixed), key=lambda name: (-sizes[name], born[name]))
    offsets: dict[str, int] = {}
    for name in wanted:
        taken = sorted(
            (offsets[other], offsets[other] + sizes[other]) for other in offsets if born[other] <= dies[name] and born[name] <= dies[other]
        )
        offset = 0
        for start, end in taken:
            if offset + sizes[name] <= start:
                break
            offset = max(offset, end)
        offsets[name] = offset
    arena = max((offsets[name] + sizes[name] for name in offsets), default=0)
    expressions = fixed | {name: f"(state->arena + {offset})" for name, offset in offsets.items()}
    place = {value: expressions[root[value]] for value in root}
    scratch = {layer.output: expressions[f"scratch of {layer.output}"] for layer in network.layers if scratch_size(layer)}
    return Plan(place, scratch, arena)
