"""Gradients of a trained module as rows of a matrix: each the gradient of the mean loss of one batch, the module in eval mode."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fewer.optimization.mfac.checks import check_memory, check_whole

Loss = Callable[[Tensor, Tensor], Tensor]
Batch = tuple[Tensor, Tensor]
AT_ONCE = 32  # samples whose gradients are taken in one vmap


def weight_matrices(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters with two dimensions or more that are trained: weights of linear and convolution layers, no biases, no norms.

    Examples:
        >>> list(weight_matrices(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))))
        ['0.weight', '2.weight']
    """
    return {name: parameter for name, parameter in module.named_parameters() if parameter.ndim >= 2 and parameter.requires_grad}


def chosen_parameters(module: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """The parameters of these names, or the weight matrices; ValueError where there are none, or a name is unknown."""
    known = dict(module.named_parameters())
    for name in names or ():
        if name not in known:
            raise ValueError(
                f"the module has no parameter {name!r}; expected names of named_parameters(), such as {next(iter(known), None)!r}"
            )
    chosen = weight_matrices(module) if names is None else {name: known[name] for name in names}
    if not chosen:
        raise ValueError("the module has no weight matrix that is trained; name the parameters: names=[...]")
    return chosen


def flatten(tensors: Iterable[Tensor]) -> Float[Tensor, "d"]:
    """Tensors as one vector, in their order."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def split_like(vector: Float[Tensor, "d"], parameters: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `flatten`: views of the vector in the parameters' shapes."""
    parts = vector.split([parameter.numel() for parameter in parameters])
    return [part.view(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)]


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """The module in eval mode, each part's own mode given back at the end."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def collect_gradients(
    module: nn.Module, loss_fn: Loss, loader: Iterable[Batch], m: int, *, names: Sequence[str] | None = None
) -> Float[Tensor, "m d"]:
    """m gradients, each of `loss_fn(module(x), y)` on one batch (x, y) of the loader; `.grad` and running statistics stay as they are.

    Small batches (1 to 16) make a good Fisher matrix; with large ones the differences between gradients average out. Batches of one
    sample go through `torch.func.vmap`, several at a time, where the module allows it.

    Args:
        module: trained; used in eval mode.
        loss_fn: the mean loss of a batch, a scalar.
        loader: gives at least m batches (inputs, targets), such as a DataLoader.
        m: gradients wanted.
        names: the parameters to differentiate by; default the weight matrices.

    Raises:
        ValueError: the loader is shorter than m, the gradients do not fit into memory, or a name is unknown.

    Examples:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.eye(2)[[k]], torch.zeros(1, 1)) for k in range(2)]
        >>> g = collect_gradients(layer, lambda output, y: output.sum(), batches, m=2)
        >>> g
        tensor([[1., 0.], [0., 1.]])
    """
    check_whole("num_grads", m)
    parameters = chosen_parameters(module, names)
    first = next(iter(parameters.values()))
    d = sum(parameter.numel() for parameter in parameters.values())
    check_memory(m, d, first.dtype, first.device)
    grads = torch.empty(m, d, dtype=first.dtype, device=first.device)
    found = 0
    with eval_mode(module):
        for rows in _gradient_rows(module, loss_fn, itertools.islice(loader, m), parameters):
            grads[found : found + len(rows)] = rows
            found += len(rows)
    if found < m:
        raise ValueError(
            f"the loader gave {found} batches; expected at least num_grads={m}: give more data, smaller batches or fewer gradients"
        )
    return grads


def _gradient_rows(
    module: nn.Module, loss_fn: Loss, batches: Iterable[Batch], parameters: dict[str, nn.Parameter]
) -> Iterator[Float[Tensor, "k d"]]:
    """The gradients in order, several at a time where vmap can."""
    device = next(iter(parameters.values())).device
    vectorised = not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())  # hooks may set attributes
    for group in _groups((x.to(device), y.to(device)) for x, y in batches):
        if vectorised and len(group) > 1:
            try:
                yield per_sample_gradients(module, loss_fn, group, parameters)
                continue
            except (
                RuntimeError,
                ValueError,
            ):  # an operation that vmap cannot do, or samples of several shapes: the loop says what is wrong
                vectorised = False
        for batch in group:
            yield batch_gradient(module, loss_fn, batch, parameters)[None]


def _groups(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    """Batches of one sample in groups of `AT_ONCE`, larger ones alone."""
    for single, run in itertools.groupby(batches, key=lambda batch: len(batch[0]) == 1):
        while group := list(itertools.islice(run, AT_ONCE if single else 1)):
            yield group


def batch_gradient(module: nn.Module, loss_fn: Loss, batch: Batch, parameters: dict[str, nn.Parameter]) -> Float[Tensor, "d"]:
    """The gradient of one batch's mean loss; zeros for parameters that the loss does not depend on."""
    x, y = batch
    with torch.enable_grad():
        parts = torch.autograd.grad(loss_fn(module(x), y), list(parameters.values()), allow_unused=True)
    return flatten(
        torch.zeros_like(parameter) if part is None else part for part, parameter in zip(parts, parameters.values(), strict=True)
    )


def per_sample_gradients(
    module: nn.Module, loss_fn: Loss, batches: Sequence[Batch], parameters: dict[str, nn.Parameter]
) -> Float[Tensor, "k d"]:
    """The same for batches of one sample, all at once."""
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))

    def loss(weights: dict[str, Tensor], sample: Tensor, target: Tensor) -> Tensor:
        return loss_fn(functional_call(module, weights, (sample[None],)), target[None])

    detached = {name: parameter.detach() for name, parameter in parameters.items()}
    with torch.no_grad():  # torch.func differentiates all the same; the parameters left out, such as biases, must not keep a graph alive
        parts = vmap(grad(loss), in_dims=(None, 0, 0))(detached, x, y)
    return torch.cat([parts[name].flatten(1) for name in parameters], dim=1)
