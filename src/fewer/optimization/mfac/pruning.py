"""One-shot and gradual pruning by optimal brain surgeon, in the idiom of torch.nn.utils.prune."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import prune

from fewer.checks import check_choice, check_whole
from fewer.optimization.mfac.gradients import Batch, Loss, chosen_parameters, collect_gradients, flatten, split_like
from fewer.optimization.mfac.inverse_fisher import InverseFisher
from fewer.optimization.mfac.obs import independent_update, joint_update, loss_increase, saliency

Update = Literal["independent", "joint"]
UPDATES = ("independent", "joint")


class MaskedWeight(Tensor):
    """weight_orig * mask, which torch.nn.utils.prune leaves in a layer as `weight`, and which can be copied and pickled.

    It hangs on a graph, and torch copies no such tensor, so a pruned model could be neither copied nor pickled. A copy of this one is its
    values alone: the next forward pass of the copied layer makes its own. Whatever is computed from it is a plain tensor.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType] - as Parameter has it

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return memo.setdefault(id(self), self.detach().clone())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().clone().__reduce_ex__(protocol)


class KeptMask(prune.CustomFromMask):
    """A given mask, on a layer that can still be copied."""

    def apply_mask(self, module: nn.Module) -> Tensor:
        return super().apply_mask(module).as_subclass(MaskedWeight)


class MFACPruning(prune.BasePruningMethod):
    """Drops the entries of lowest importance; the importance is meant to be `obs_scores`.

    For one tensor: `MFACPruning.apply(layer, "weight", amount, importance_scores=scores)`; over layers:
    `prune.global_unstructured(pairs, MFACPruning, importance_scores=..., amount=...)`. It sets masks only; `prune_module` also
    lets the remaining weights make up for the loss.

    Args:
        amount: entries to drop of those not pruned yet: a fraction in [0, 1), or a number of entries.

    Raises:
        ValueError: a fraction outside [0, 1), or a negative number.

    Examples:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> _ = MFACPruning.apply(layer, "weight", 0.5, importance_scores=torch.tensor([[3.0, 1.0], [2.0, 4.0]]))
        >>> layer.weight_mask
        tensor([[1., 0.], [0., 1.]])
    """

    PRUNING_TYPE = "unstructured"

    def __init__(self, amount: float | int) -> None:
        if isinstance(amount, float):
            check_sparsity(amount, "amount")
        else:
            check_whole(least=0, amount=amount)
        self.amount = amount

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The default mask with the `amount` entries of lowest importance `t` set to 0."""
        number = round(self.amount * t.numel()) if isinstance(self.amount, float) else self.amount
        if number > t.numel():
            raise ValueError(f"amount is {number}, but only {t.numel()} entries are left; drop fewer")
        mask = default_mask.clone(memory_format=torch.contiguous_format)
        mask.view(-1)[t.flatten().topk(number, largest=False).indices] = 0
        return mask

    def apply_mask(self, module: nn.Module) -> Tensor:
        """The masked weight, as one that can be copied."""
        return super().apply_mask(module).as_subclass(MaskedWeight)

    @classmethod
    def apply(cls, module: nn.Module, name: str, amount: float | int, importance_scores: Tensor | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] - torch's own subclasses narrow it so too
        """Prune `module.name` by the scores (same shape)."""
        return super().apply(module, name, amount=amount, importance_scores=importance_scores)


@dataclass(frozen=True)
class PruneReport:
    """What `prune_module` did.

    Attributes:
        sparsity: fraction of the chosen weights that are exactly zero now.
        dropped: how many that are.
        weights: how many were chosen from.
        per_parameter: name -> its sparsity.
        steps: the sparsity after each step.
        loss_increase: by how much the quadratic model says the loss rose (1/2 delta^T F delta, summed over the steps).
        seconds: the whole took.
    """

    sparsity: float
    dropped: int
    weights: int
    per_parameter: dict[str, float]
    steps: tuple[float, ...]
    loss_increase: float
    seconds: float


def check_sparsity(sparsity: float, name: str = "sparsity") -> None:
    """ValueError unless it lies in [0, 1)."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"{name} is {sparsity}; expected a fraction in [0, 1), such as 0.9 to drop nine weights of ten")


def sparsity_steps(sparsity: float, steps: int) -> list[float]:
    """s_j = 1 - (1 - s)^{j/r}: every step drops the same fraction of what is left.

    Examples:
        >>> [round(s, 4) for s in sparsity_steps(0.75, 2)]
        [0.5, 0.75]
    """
    return [1 - (1 - sparsity) ** (step / steps) for step in range(1, steps)] + [sparsity]


def obs_scores(
    module: nn.Module,
    grads: Float[Tensor, "m d"],
    damping: float = 1e-5,
    block_size: int | None = 2000,
    *,
    names: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """rho_i = w_i^2 / (2 [F^{-1}]_ii) for every weight, in the weights' shapes, float32 at least, by parameter name.

    Args:
        module: trained.
        grads: what `collect_gradients` gives for the same module and names.
        damping: lambda.
        block_size: consecutive weights that F couples; None couples all.
        names: the parameters; default the weight matrices.

    Raises:
        ValueError: gradients of another width, or as `InverseFisher`.

    Examples:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.ones_(layer.weight)
        >>> obs_scores(layer, torch.tensor([[2.0, 0.0]]), damping=1.0)  # F = diag(5, 1)
        {'weight': tensor([[2.5000, 0.5000]])}
    """
    parameters = chosen_parameters(module, names)
    weights = flatten(parameters.values())
    fisher = InverseFisher(grads, damping, block_size=block_size)
    if fisher.d != len(weights):
        raise ValueError(
            f"grads has {fisher.d} columns; expected {len(weights)}, one for each chosen weight: collect them for the same names"
        )
    scores = saliency(weights, fisher.diagonal())
    return dict(zip(parameters, split_like(scores, list(parameters.values())), strict=True))


def prune_module(
    module: nn.Module,
    loss_fn: Loss,
    loader: Iterable[Batch],
    sparsity: float,
    num_grads: int = 256,
    damping: float = 1e-5,
    block_size: int | None = 2000,
    update: Update = "independent",
    recompute: int = 1,
    *,
    names: Sequence[str] | None = None,
) -> PruneReport:
    """Drop the fraction `sparsity` of the module's weights, in place, and let the others make up for it.

    The dropped weights become exactly 0 and stay so: masks are left as `torch.nn.utils.prune` keeps them (`weight_orig`,
    `weight_mask`), so the module can be trained on, copied and pickled; `prune.remove(layer, "weight")` makes it permanent. A parameter
    that stands at several places is masked at each. What was pruned before counts as dropped and stays dropped. Sums and updates are
    float32 at least whatever the weights are. An error leaves the module as it was.

    Args:
        module: trained.
        loss_fn: `loss_fn(module(x), y)`, the mean loss of a batch.
        loader: gives (x, y); read anew in each step, at least `num_grads` batches. Small batches (1 to 16) are best.
        sparsity: in [0, 1), of the chosen weights together.
        num_grads: m (released: 256 to 1024).
        damping: lambda (released: 1e-5).
        block_size: b (released: 2000, or None for all).
        update: "independent" (the released rule: single-weight updates added up, which ignores that dropped weights are correlated),
            or "joint" (exact for the set dropped; not in the paper).
        recompute: r, steps in which the sparsity is reached, each with fresh gradients.
        names: parameters to prune, by the names they had before any pruning too; default the weight matrices, no biases and no norms.

    Raises:
        ValueError: a setting out of range, or the loader is shorter than num_grads.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> batches = [(torch.randn(4, 8), torch.randint(2, (4,))) for _ in range(64)]
        >>> report = prune_module(model, nn.functional.cross_entropy, batches, sparsity=0.5, num_grads=64)
        >>> report.sparsity, int((model[0].weight == 0).sum() + (model[2].weight == 0).sum())
        (0.5, 80)
    """
    started = time.perf_counter()
    check_sparsity(sparsity)
    check_whole(recompute=recompute)
    check_choice(UPDATES, update=update)
    parameters = chosen_parameters(module, names)
    tensors = list(parameters.values())
    places = [places_of(module, parameter) for parameter in tensors]
    before, alive = flatten(tensors), _alive(tensors, places)
    after, steps, increase = before * alive, [], 0.0
    try:
        for target in sparsity_steps(sparsity, recompute):
            _write(tensors, after)
            grads = collect_gradients(module, loss_fn, loader, num_grads, names=list(parameters)).mul_(alive)
            delta, alive = _one_step(grads, damping, block_size, after, alive, target, update)
            after = torch.where(alive, after + delta, 0.0)
            increase += loss_increase(grads, damping, block_size or grads.shape[1], delta)
            steps.append(1 - float(alive.float().mean()))
    except BaseException:
        _write(tensors, before)
        raise
    _write(tensors, after)
    masks = split_like(alive, tensors)
    for parameter, mask, held in zip(tensors, masks, places, strict=True):
        for place in held:
            place.put(mask.to(parameter.dtype))
    dropped = int((~alive).sum())
    shares = {name.removesuffix("_orig"): 1 - float(mask.float().mean()) for name, mask in zip(parameters, masks, strict=True)}
    return PruneReport(dropped / len(alive), dropped, len(alive), shares, tuple(steps), increase, time.perf_counter() - started)


class Place(NamedTuple):
    """Where a parameter stands: a layer, and the name there, as torch.nn.utils.prune says it (without its "_orig")."""

    layer: nn.Module
    attribute: str

    @property
    def mask(self) -> Tensor | None:
        """What was pruned there before."""
        return self.layer._buffers.get(f"{self.attribute}_mask")

    def put(self, mask: Tensor) -> None:
        """Prune by a mask, in place of what was pruned before."""
        if self.mask is not None:
            prune.remove(self.layer, self.attribute)
        KeptMask.apply(self.layer, self.attribute, mask=mask)


def places_of(module: nn.Module, parameter: nn.Parameter) -> list[Place]:
    """All places of a parameter: several where modules are tied. A mask at one of them alone would let the weights grow back at the others."""
    found = []
    for layer in module.modules():
        for name, held in layer._parameters.items():
            if held is parameter:
                plain = name.removesuffix("_orig")
                found.append(Place(layer, plain if f"{plain}_mask" in layer._buffers else name))
    return found


def _one_step(
    grads: Tensor, damping: float, block_size: int | None, weights: Tensor, alive: Tensor, target: float, update: Update
) -> tuple[Tensor, Tensor]:
    """(delta, which weights stay) on the way to the target sparsity; delta takes those that do not to 0."""
    fisher = InverseFisher(grads, damping, block_size=block_size)
    diagonal = fisher.diagonal()
    number = max(0, round(target * len(weights)) - int((~alive).sum()))
    scores = saliency(weights, diagonal)[alive]
    stays = alive.clone()
    stays[alive] = MFACPruning(number).compute_mask(scores, torch.ones_like(scores)).bool()
    if update == "joint":
        delta = joint_update(grads, damping, fisher.block_size, weights, ~stays)
    else:
        delta = independent_update(fisher, diagonal, weights, ~stays)
    return torch.where(stays, delta, -weights), stays


def _alive(parameters: Sequence[nn.Parameter], places: Sequence[Sequence[Place]]) -> Tensor:
    """Which weights no earlier pruning has masked, at none of their places."""
    kept = []
    for parameter, held in zip(parameters, places, strict=True):
        masks = [place.mask.bool() for place in held if place.mask is not None]
        kept.append(torch.stack([torch.ones_like(parameter, dtype=torch.bool), *masks]).all(0))
    return flatten(kept).bool()


@torch.no_grad()
def _write(parameters: Sequence[nn.Parameter], vector: Float[Tensor, "d"]) -> None:
    """Put the vector into the parameters."""
    for parameter, part in zip(parameters, split_like(vector, parameters), strict=True):
        parameter.copy_(part)
