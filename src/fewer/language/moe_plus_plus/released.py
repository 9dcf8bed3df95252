"""Reads a directory in the layout of the released model (one tensor for each expert and part) into ours; every tensor, or it is refused.

The experts' kinds are told from what they hold: two projections, a vector and its router, or nothing (copy, then zero).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fewer.files import read_json, read_weights
from fewer.language._shared.model_directory import weight_files
from fewer.language.moe_plus_plus.layer import ConstantExperts
from fewer.language.moe_plus_plus.model import MoEPlusPlusConfig, MoEPlusPlusDecoderLayer, MoEPlusPlusForCausalLM

PART = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.experts\.(\d+)\.(up_proj|down_proj|constant|wg)(?:\.weight)?$")
GATE = re.compile(r"model\.layers\.(\d+)\.mlp\.gate\.(wg|gate_map)(?:\.(\d))?(?:\.weight)?$")
LLAMA = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
    "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings", "attention_bias", "hidden_act", "bos_token_id", "eos_token_id",
    "pad_token_id", "initializer_range",
)  # fmt: skip
Experts = dict[tuple[int, int], dict[str, Tensor]]  # (layer, expert) -> its parts


def load_released(path: str | Path) -> MoEPlusPlusForCausalLM:
    """The released model in a directory (config.json, safetensors) as ours, in eval mode, with its own gating ("released") and router.

    Raises:
        ValueError: a tensor is of no known part, or the experts are not those of a layer: the message names the keys.
    """
    folder = Path(path)
    weights: dict[str, Tensor] = {}
    for file in weight_files(folder):
        weights |= read_weights(file)
    experts, gates, rest = _sorted_out(weights)
    config = _config(folder, experts, gates, rest)
    model = MoEPlusPlusForCausalLM(config)
    _fill_rest(model, rest, folder)
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            _fill(cast(Any, cast(MoEPlusPlusDecoderLayer, layer).mlp), number, experts, gates)
    return model.eval()


def _sorted_out(weights: dict[str, Tensor]) -> tuple[Experts, dict[int, dict[str, Tensor]], dict[str, Tensor]]:
    """(parts of experts, parts of gates by layer, what is Llama's)."""
    experts: Experts = {}
    gates: dict[int, dict[str, Tensor]] = {}
    rest = {}
    for name, value in weights.items():
        if found := PART.match(name):
            experts.setdefault((int(found[1]), int(found[2])), {})[found[3]] = value
        elif found := GATE.match(name):
            gates.setdefault(int(found[1]), {})[f"{found[2]}.{found[3]}" if found[3] else found[2]] = value
        else:
            rest[name] = value
    return experts, gates, rest


def _config(folder: Path, experts: Experts, gates: dict[int, dict[str, Tensor]], rest: dict[str, Tensor]) -> MoEPlusPlusConfig:
    written = read_json(folder / "config.json")
    layers = int(written.get("num_hidden_layers", 0))
    if not layers or sorted(gates) != list(range(layers)):
        raise ValueError(f"{folder} has gates of layers {sorted(gates)} and its config names {layers}; expected one for each layer")
    kinds = [frozenset(experts.get((0, number), {})) for number in range(_experts_of(gates[0]))]
    networks, constants = kinds.count(frozenset({"up_proj", "down_proj"})), kinds.count(frozenset({"constant", "wg"}))
    free = len(kinds) - networks - constants
    ordered = [frozenset({"up_proj", "down_proj"})] * networks + [frozenset({"constant", "wg"})] * constants + [frozenset[str]()] * free
    odd = [f"{layer}.{number}" for (layer, number), parts in experts.items() if number >= len(kinds) or frozenset(parts) != kinds[number]]
    if kinds != ordered or odd or not networks or free != 2:
        raise ValueError(
            f"{folder} has {networks} experts with networks, {constants} constant and {free} empty ones (unlike the first layer's: "
            f"{', '.join(odd[:5]) or 'none'}); expected networks, then constants, then one copy and one zero expert, the same in every layer"
        )
    given = {name: written[name] for name in LLAMA if name in written}
    return MoEPlusPlusConfig(
        **given, intermediate_size=experts[0, 0]["down_proj"].shape[1], num_ffn_experts=networks, num_constant=constants, num_zero=1, num_copy=1,
        gating="released", router="mlp" if "wg.0" in gates[0] else "linear", gate_residual=any("gate_map" in gate for gate in gates.values()),
    )  # fmt: skip  # pyright: ignore[reportCallIssue]


def _experts_of(gate: dict[str, Tensor]) -> int:
    last = gate.get("wg", gate.get("wg.2"))
    if last is None:
        raise ValueError(f"a gate holds {', '.join(sorted(gate)) or 'nothing'}; expected wg.weight, or wg.0.weight and wg.2.weight")
    return len(last)


def _fill(mixture: Any, number: int, experts: Experts, gates: dict[int, dict[str, Tensor]]) -> None:
    for expert in range(mixture.num_ffn):
        mixture.experts.up_proj[expert].copy_(experts[number, expert]["up_proj"])
        mixture.experts.down_proj[expert].copy_(experts[number, expert]["down_proj"])
    constants = cast(ConstantExperts, mixture.constants)
    for expert in range(mixture.num_constant):
        constants.constant[expert].copy_(experts[number, mixture.num_ffn + expert]["constant"])
        constants.wg[expert].copy_(experts[number, mixture.num_ffn + expert]["wg"])
    gate = dict(gates[number])
    if mixture.router.gate_map is None:
        gate.pop("gate_map", None)  # the first layer's: the released module owns one and never uses it
    own = {"wg": "wg.weight", "wg.0": "wg.0.weight", "wg.2": "wg.2.weight", "gate_map": "gate_map.weight"}
    mixture.router.load_state_dict({own[name]: value for name, value in gate.items()})


def _fill_rest(model: MoEPlusPlusForCausalLM, rest: dict[str, Tensor], folder: Path) -> None:
    """Attention, norms, embeddings and head, under Llama's own names."""
    about = model.load_state_dict(rest, strict=False)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set[str]()
    missing = [name for name in about.missing_keys if not re.search(r"\.mlp\.", name) and name not in tied]
    odd = sorted([*missing, *about.unexpected_keys])
    if odd:
        raise ValueError(f"{folder} lacks, or has beside the released layout: {', '.join(odd[:8])}; expected its names alone")
