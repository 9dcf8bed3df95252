"""LoRA's factors in a peft model: A drawn from a seed and frozen, a fingerprint of what must agree, the gap of averaging, and the noise.

W = W0 + s B A with s = alpha / r, A [r, d_in] and B [d_out, r].
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewer.checks import check_choice, check_not_negative, check_whole
from fewer.federated._shared.flat_model import FlatModel

Init = Literal["kaiming", "orthonormal"]
PLAIN_STARTS = (True, False, "gaussian")  # peft's ways to begin that leave W0 as it was


def freeze_a(peft_model: Any, seed: int = 0, init: Init = "kaiming") -> Any:
    """Draw every lora_A anew from the seed, freeze it, and set lora_B to zero; in place.

    The draw depends on the seed and the layer's name alone: every client makes the same A without receiving it.

    Args:
        peft_model: a peft model with LoRA on linear or convolutional layers.
        seed: of A.
        init: "kaiming": U(-1/sqrt(d_in), 1/sqrt(d_in)), as in peft; "orthonormal": rows at right angles, of length 1.

    Returns:
        the same model.

    Raises:
        ValueError: no layer has lora_A, an adapter sits on an embedding, peft's start changed the base weights (PiSSA, OLoRA, ...), or
            there are more orthonormal rows asked for than a layer has inputs.

    Warns:
        UserWarning: more is trained than lora_B (a head, biases): those bytes travel as well, and are no longer halved.

    Examples:
        >>> from peft import LoraConfig, get_peft_model
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6))
        >>> model = freeze_a(get_peft_model(net, LoraConfig(r=2, target_modules=["2"])))
        >>> [name.rpartition(".lora_")[2] for name, each in model.named_parameters() if each.requires_grad]
        ['B.default.weight']
    """
    check_whole(least=0, seed=seed)
    check_choice(get_args(Init), init=init)
    layers = list(lora_layers(peft_model))
    if not layers:
        kinds = sorted({type(module).__name__ for module in peft_model.modules()})
        raise ValueError(
            f"no layer has lora_A (the model's modules are {', '.join(kinds)}); expected peft.get_peft_model(model, LoraConfig())"
        )
    for adapter, config in getattr(peft_model, "peft_config", {}).items():
        if (start := getattr(config, "init_lora_weights", True)) not in PLAIN_STARTS:
            raise ValueError(
                f"adapter {adapter!r} starts by init_lora_weights={start!r}, which moves weight into A; expected a start that A can be redrawn "
                "after: init_lora_weights=True"
            )
    with torch.no_grad():
        for name, a, b in layers:
            a.copy_(draw_a(a.shape, seed, name, init))
            a.requires_grad_(False)
            b.zero_()
    _warn_of_more(peft_model)
    return peft_model


def lora_layers(peft_model: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """(name, A, B) of each adapted layer and adapter; the name is the layer's, then the adapter's.

    Raises:
        ValueError: an adapter sits on an embedding, whose A starts at zero.
    """
    for name, module in peft_model.named_modules():
        if len(getattr(module, "lora_embedding_A", ())):
            raise ValueError(f"layer {name!r} adapts an embedding; expected linear or convolutional layers: take it off target_modules")
        adapted: Any = module
        for adapter, a in getattr(module, "lora_A", nn.ModuleDict()).items():
            yield f"{name}.{adapter}", a.weight, adapted.lora_B[adapter].weight


def draw_a(shape: Sequence[int], seed: int, name: str, init: Init = "kaiming") -> Float[Tensor, "r d_in"]:
    """A of a layer, from a generator seeded by the seed and the layer's name, in float32 on the CPU whatever it is copied to."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    r, d_in = shape[0], math.prod(shape[1:])
    if init == "kaiming":
        return torch.empty(tuple(shape)).uniform_(-1 / math.sqrt(d_in), 1 / math.sqrt(d_in), generator=generator)
    if r > d_in:
        raise ValueError(f"layer {name!r} has rank {r} and {d_in} inputs; expected no more orthonormal rows than inputs: a smaller rank")
    q, upper = torch.linalg.qr(torch.randn(d_in, r, generator=generator))
    return (q * upper.diagonal().sign()).T.reshape(tuple(shape))


def _warn_of_more(peft_model: nn.Module) -> None:
    """Warn where more is trained than lora_B."""
    trained = {name: each.numel() for name, each in peft_model.named_parameters() if each.requires_grad}
    if more := {name: size for name, size in trained.items() if ".lora_B." not in name}:
        share = sum(more.values()) / sum(trained.values())
        warnings.warn(
            f"{next(iter(more))} and {len(more) - 1} more parameters train beside lora_B and are {100 * share:.0f} % of the bytes; expected lora_B "
            "alone, or the bytes are not halved: freeze them, or leave out modules_to_save",
            stacklevel=3,
        )


def adapter_fingerprint(peft_model: nn.Module) -> str:
    """SHA-256 over what clients must agree on without sending it: the frozen adapter tensors in float32, and the names and shapes of all.

    Clients whose A differ (no seed, another version of torch) would average nonsense without a sign of it.

    Examples:
        >>> from peft import LoraConfig, get_peft_model
        >>> def model(seed):
        ...     return freeze_a(get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"])), seed)
        >>> adapter_fingerprint(model(0)) == adapter_fingerprint(model(0)), adapter_fingerprint(model(0)) == adapter_fingerprint(model(1))
        (True, False)
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(peft_model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        if "lora_" in name and not parameter.requires_grad:
            digest.update(_bytes(parameter))
    return digest.hexdigest()


def agreement(peft_model: nn.Module) -> dict[str, str]:
    """What clients tell of their adapters before round 1: the fingerprint, then a line a layer, so that the first that differs is named."""
    told = {"adapter fingerprint": adapter_fingerprint(peft_model)}
    for name, a, b in lora_layers(peft_model):
        drawn = "trained" if a.requires_grad else hashlib.sha256(_bytes(a)).hexdigest()[:16]
        told[f"layer {name}"] = f"rank {len(a)}, {tuple(a.shape)} to {tuple(b.shape)}, A {drawn}"
    return told


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().float().cpu().contiguous().numpy().tobytes()


def adapter_vectors(flat: FlatModel, vector: Float[Tensor, "d"]) -> dict[str, tuple[Tensor, Tensor]]:
    """layer -> (A, B) at a flat vector; what is frozen is taken from the model. Convolutions are flattened to matrices."""
    values: dict[str, Tensor] = {name: each.detach() for name, each in flat.model.named_parameters()} | flat.named(vector)
    names = {id(parameter): name for name, parameter in flat.model.named_parameters()}
    return {name: (values[names[id(a)]].flatten(1), values[names[id(b)]].flatten(1)) for name, a, b in lora_layers(flat.model)}


def aggregation_gap(flat: FlatModel, client_vectors: Sequence[Float[Tensor, "d"]]) -> dict[str, float]:
    """layer -> |mean(B_i A_i) - mean(B) mean(A)|_F / |mean(B_i A_i)|_F: what averaging the factors loses of the mean of the products.

    It is |mean((B_i - mean B)(A_i - mean A))|_F over the same, and nothing where A is shared.

    Args:
        flat: the peft model.
        client_vectors: what the clients sent [d] each.

    Raises:
        ValueError: no vectors are given.
    """
    if not len(client_vectors):
        raise ValueError("no client_vectors were given; expected what at least one client sent")
    clients = [adapter_vectors(flat, vector) for vector in client_vectors]
    gaps = {}
    for layer in clients[0]:
        a, b = (torch.stack([client[layer][which].double() for client in clients]) for which in (0, 1))
        mean_of_products = (b @ a).mean(0)
        whole = mean_of_products.norm()
        gaps[layer] = float((mean_of_products - b.mean(0) @ a.mean(0)).norm() / whole) if whole else 0.0
    return gaps


def noise_energy(A: Float[Tensor, "r d_in"], B: Float[Tensor, "d_out r"], step_noise: float) -> tuple[float, float, float]:
    """E|.|_F^2 of the three terms by which noise in one step on both factors changes their product: xi_B A, B xi_A and xi_B xi_A.

    With t the standard deviation of each entry these are t^2 d_out |A|^2, t^2 d_in |B|^2 and t^4 d_in d_out r. FFA-LoRA has the first alone.

    Args:
        A, B: the factors.
        step_noise: t = eta sigma C / batch.

    Examples:
        >>> noise_energy(torch.ones(2, 3), torch.zeros(4, 2), 0.5)
        (6.0, 0.0, 1.5)
    """
    check_not_negative(step_noise=step_noise)
    variance, (r, d_in), d_out = step_noise**2, A.shape, len(B)
    if B.shape != (d_out, r):
        raise ValueError(f"A is {tuple(A.shape)} and B {tuple(B.shape)}; expected A [r, d_in] and B [d_out, r] of one rank")
    return variance * d_out * float(A.square().sum()), variance * d_in * float(B.square().sum()), variance**2 * d_in * d_out * r
