"""Cut the feed-forward networks of a trained model into experts, and put them together again. No weight changes.

Source: FactorLLM, arXiv 2408.11855: one permutation of a network's neurons, N equal groups of it, the same neurons of all three matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from fewer.checks import check_choice, check_whole
from fewer.language._shared.feed_forward import decoder_layers, parts_of
from fewer.language._shared.saved_form import become, in_class
from fewer.language.factor_llm.model import FAMILIES, PREFIX, FactorizedMLP

Partition = Literal["contiguous", "random", "cluster"]
OWN = ("num_experts", "top_k", "factor_layers")  # settings that the plain config does not know
ROUNDS = 20  # of balanced k-means


def factorize(
    model: Any,
    num_experts: int = 4,
    top_k: int = 2,
    partition: Partition = "contiguous",
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> Any:
    """Cut feed-forward networks of a Llama, Mistral or Qwen2 causal language model into experts, in place; routers are new and random.

    The model stays one that `save_pretrained` writes and AutoModelForCausalLM reads (`FactorLlamaForCausalLM`, still a LlamaForCausalLM).

    Args:
        num_experts, top_k: N and K; K = N is the dense network.
        partition: how neurons come into groups: "contiguous" in their order, "random", or "cluster", balanced k-means of the gate's rows.
        layers: which layers; None is all of them.
        seed: draws routers, and groups where `partition` is not "contiguous".

    Returns:
        the model.

    Raises:
        ValueError: numbers that do not fit, a model that is factorised already or of another family, layers that are not there.
        TypeError: the weights are quantised.
    """
    check_whole(2, num_experts=num_experts)
    check_whole(top_k=top_k)
    check_choice(get_args(Partition), partition=partition)
    numbers = check_factorizable(model, num_experts, top_k, layers)
    found = model.model.layers
    draw = torch.Generator().manual_seed(seed)
    for number in numbers:
        gate, up, down = parts_of(found[number])
        made = _experts(gate, up, down, groups_of(gate.weight.detach(), num_experts, partition, draw), top_k, model.config.hidden_act, draw)
        found[number].mlp = made.train(model.training)
    become(model, *FAMILIES[model.config.model_type], num_experts=num_experts, top_k=top_k, factor_layers=numbers)
    return model


def check_factorizable(model: Any, num_experts: int, top_k: int, layers: Sequence[int] | None = None) -> list[int]:
    """The layers to be cut; ValueError (TypeError on quantised weights) where they cannot be."""
    if top_k > num_experts:
        raise ValueError(f"top_k is {top_k} and there are {num_experts} experts; expected at most {num_experts}")
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if str(kind).startswith(PREFIX):
        raise ValueError(f"{type(model).__name__} is factorised already; expected the dense model: unfactorize it first")
    found = decoder_layers(model)
    if kind not in FAMILIES or type(model) is not FAMILIES[kind][1].__mro__[2]:
        raise ValueError(f"{type(model).__name__} ({kind}) is of no family that is cut; expected one of {', '.join(FAMILIES)}")
    numbers = sorted(set(range(len(found)) if layers is None else layers))
    outside = [number for number in numbers if not 0 <= number < len(found)]
    if outside or not numbers:
        raise ValueError(f"layers are {list(layers or ())}; expected numbers from 0 to {len(found) - 1}, at least one")
    for number in numbers:
        linears = parts_of(found[number])
        if any(linear.bias is not None for linear in linears):
            raise ValueError(
                f"the feed-forward network of layer {number} has biases; expected none: a sum of experts would add them N times"
            )
        width = linears[2].in_features
        if width % num_experts:
            raise ValueError(f"intermediate_size is {width} and num_experts {num_experts}; expected a divisor of {width}")
    return numbers


def groups_of(gate: Float[Tensor, "I H"], groups: int, partition: Partition, draw: torch.Generator) -> Int64[Tensor, "N I/N"]:
    """The neurons of each expert, rising."""
    neurons = len(gate)
    if partition == "contiguous":
        return torch.arange(neurons).reshape(groups, -1)
    if partition == "random":
        return torch.randperm(neurons, generator=draw).reshape(groups, -1).sort(-1).values
    return balanced_clusters(gate, groups, draw)


def balanced_clusters(rows: Float[Tensor, "I H"], groups: int, draw: torch.Generator) -> Int64[Tensor, "N I/N"]:
    """Clusters of exactly I/N rows by cosine: k-means in which the rows that care most choose first, among the clusters with room.

    >>> balanced_clusters(torch.tensor([[1.0, 0], [0, 1], [2, 0], [0, 3]]), 2, torch.Generator().manual_seed(0)).sort(0).values.tolist()
    [[0, 2], [1, 3]]
    """
    unit = nn.functional.normalize(rows.float().cpu(), dim=-1)
    size, assigned = len(rows) // groups, torch.full((len(rows),), -1)
    centres = unit[torch.randperm(len(rows), generator=draw)[:groups]]
    for _ in range(ROUNDS):
        found = _with_room(unit @ centres.T, size)
        if torch.equal(found, assigned):
            break
        assigned = found
        centres = nn.functional.normalize(torch.stack([unit[assigned == group].sum(0) for group in range(groups)]), dim=-1)
    return torch.stack([(assigned == group).nonzero().squeeze(1) for group in range(groups)])


def _with_room(nearness: Float[Tensor, "I N"], size: int) -> Int64[Tensor, "I"]:
    """The nearest cluster of each row that has room for it; rows whose first choice is far ahead of their second come first."""
    best = nearness.topk(2, dim=-1).values
    wishes = nearness.argsort(dim=-1, descending=True).tolist()
    room, assigned = [size] * nearness.shape[1], [0] * len(nearness)
    for row in (best[:, 0] - best[:, 1]).argsort(descending=True).tolist():
        assigned[row] = next(group for group in wishes[row] if room[group])
        room[assigned[row]] -= 1
    return torch.tensor(assigned)


@torch.no_grad()
def _experts(
    gate: nn.Linear, up: nn.Linear, down: nn.Linear, ids: Int64[Tensor, "N I/N"], top_k: int, act: str, draw: torch.Generator
) -> FactorizedMLP:
    weight = gate.weight
    made: Any = FactorizedMLP(gate.in_features, gate.out_features, len(ids), top_k, act)
    bound = gate.in_features**-0.5  # torch's default for a Linear, drawn from the seed
    for each in (made.router.weight, made.router.bias):
        each.copy_(torch.empty(each.shape).uniform_(-bound, bound, generator=draw))
    made = made.to(weight)
    place = ids.to(weight.device)
    made.gate_up.copy_(torch.cat([gate.weight[place], up.weight[place]], dim=1))
    made.down.copy_(down.weight[:, place].transpose(0, 1))
    made.expert_ids = place.clone()
    return made


@torch.no_grad()
def unfactorize(model: Any) -> Any:
    """Put a factorised model together again, in place: its plain class, every neuron back in its place, routers gone.

    Untouched experts give the dense model's weights, bit for bit; tuned ones the dense model of the tuned experts (all of them run).

    Raises:
        ValueError: the model is not factorised.
    """
    kind = str(getattr(getattr(model, "config", None), "model_type", None))
    if not kind.startswith(PREFIX):
        raise ValueError(f"{type(model).__name__} is not factorised; expected what factorize or load_directory gave")
    factor_config, factor_model = FAMILIES[kind.removeprefix(PREFIX)]
    plain_config: Any = factor_config.__mro__[1]
    plain_model: Any = factor_model.__mro__[2]
    with torch.device("meta"):
        plain = plain_model(in_class(model.config, plain_config, without=OWN))
    for number in model.config.factor_layers:
        layer = model.model.layers[number]
        layer.mlp = _filled(plain.model.layers[number].mlp, cast(FactorizedMLP, layer.mlp))
    become(model, plain_config, plain_model, without=OWN)
    return model


def _filled(plain: Any, experts: FactorizedMLP) -> nn.Module:
    """A plain feed-forward network with the experts' neurons, each in its place."""
    plain = plain.to_empty(device=experts.down.device).to(experts.down.dtype).train(experts.training)
    ids = cast(Tensor, experts.expert_ids).flatten()
    gate, up = (part.flatten(0, 1) for part in experts.gate_up.chunk(2, dim=1))
    plain.gate_proj.weight[ids] = gate
    plain.up_proj.weight[ids] = up
    plain.down_proj.weight[:, ids] = experts.down.transpose(0, 1).flatten(1)
    return plain.requires_grad_(experts.down.requires_grad)
