"""Gradients of a trained module as rows of a matrix: each the gradient of the mean loss of one batch, the module in eval mode."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import psutil
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fewer.checks import check_whole
from fewer.fitting import evaluating

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
    """The parameters of these names, or the weight matrices. A pruned `weight` is found as the `weight_orig` that it became.

    Raises:
        ValueError: there are none, a name is unknown, or two are one memory (the same parameter at several places is one, and is fine).
    """
    known = dict(module.named_parameters(remove_duplicate=False))
    chosen = {} if names is not None else weight_matrices(module)
    for name in names or ():
        found = name if name in known else f"{name}_orig"
        if found not in known:
            raise ValueError(
                f"the module has no parameter {name!r}; expected names of named_parameters(), such as {next(iter(known), None)!r}"
            )
        if not any(known[found] is parameter for parameter in chosen.values()):
            chosen[found] = known[found]
    if not chosen:
        raise ValueError("the module has no weight matrix that is trained; name the parameters: names=[...]")
    places: dict[int, str] = {}
    for name, parameter in chosen.items():
        if parameter.numel() and (other := places.setdefault(parameter.data_ptr(), name)) != name:
            raise ValueError(
                f"{other} and {name} are two parameters on one memory; expected one: tie them (b.weight = a.weight), or name one"
            )
    return chosen


def wide(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype that holds all of these, float32 at least: 1 / lambda and sums of squares leave what 16 bits can say.

    >>> wide(torch.float16), wide(torch.bfloat16, torch.float64)
    (torch.float32, torch.float64)
    """
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def flatten(tensors: Iterable[Tensor]) -> Float[Tensor, "d"]:
    """Tensors as one vector of at least float32, in their order."""
    parts = [tensor.detach().flatten() for tensor in tensors]
    return torch.cat(parts).to(wide(*(part.dtype for part in parts)))


def split_like(vector: Float[Tensor, "d"], parameters: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `flatten`: views of the vector in the parameters' shapes."""
    parts = vector.split([parameter.numel() for parameter in parameters])
    return [part.view(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)]


def collect_gradients(
    module: nn.Module, loss_fn: Loss, loader: Iterable[Batch], m: int, *, names: Sequence[str] | None = None
) -> Float[Tensor, "m d"]:
    """m gradients, each of `loss_fn(module(x), y)` on one batch (x, y) of the loader; `.grad` and running statistics stay as they are.

    Small batches (1 to 16) make a good Fisher matrix; with large ones the differences between gradients average out. Batches of one
    sample go through `torch.func.vmap`, several at a time, where the module allows it.

    Args:
        module: trained; used in eval mode.
        loss_fn: the mean loss of a batch, a scalar.
        loader: gives at least m batches (inputs, targets), such as a DataLoader; class numbers may be of any integer type.
        m: gradients wanted.
        names: the parameters to differentiate by; default the weight matrices.

    Returns:
        [m, d], of the parameters' dtype, float32 at least.

    Raises:
        ValueError: the loader is shorter than m, the gradients do not fit into memory, or a name is unknown.

    Examples:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.eye(2)[[k]], torch.zeros(1, 1)) for k in range(2)]
        >>> g = collect_gradients(layer, lambda output, y: output.sum(), batches, m=2)
        >>> g
        tensor([[1., 0.], [0., 1.]])
    """
    check_whole(num_grads=m)
    parameters = chosen_parameters(module, names)
    device, dtype = next(iter(parameters.values())).device, wide(*(parameter.dtype for parameter in parameters.values()))
    d = sum(parameter.numel() for parameter in parameters.values())
    check_memory(m, d, dtype, device)
    grads = torch.empty(m, d, dtype=dtype, device=device)
    found = 0
    with evaluating(module):
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
    for group in _groups((x.to(device), _targets(y).to(device)) for x, y in batches):
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


def _targets(y: Tensor) -> Tensor:
    """Class numbers as the integers that torch's losses take; other targets as they are."""
    return y if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool else y.long()


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


# What is asked of gradients


def check_gradients(grads: object) -> None:
    """ValueError unless `grads` is a floating-point tensor [m, d] with m, d >= 1 and finite entries."""
    if not isinstance(grads, Tensor) or not grads.is_floating_point() or grads.ndim != 2:
        given = f"{tuple(grads.shape)} {grads.dtype}" if isinstance(grads, Tensor) else type(grads).__name__
        raise ValueError(f"grads is {given}; expected a floating-point tensor [m, d]: one flattened gradient per row")
    if grads.numel() == 0:
        raise ValueError(f"grads is {tuple(grads.shape)}, which is empty; expected at least one gradient of at least one weight")
    if not bool(grads.sum().isfinite()):  # one quick pass; a sum of finite entries may overflow, so then they are looked at one by one
        rows = (~grads.isfinite().all(1)).nonzero()[:, 0].tolist()
        if rows:
            raise ValueError(f"grads has a NaN or infinite value in row {rows[0]}; expected finite gradients: drop that row")


def check_length(x: Tensor, d: int, *, columns: bool = False) -> None:
    """ValueError unless x is [d], or [d, k] where columns are allowed."""
    if not x.is_floating_point() or x.ndim not in ((1, 2) if columns else (1,)) or x.shape[0] != d:
        expected = f"[{d}] or [{d}, k]" if columns else f"[{d}]"
        raise ValueError(f"x is {tuple(x.shape)} {x.dtype}; expected a floating-point tensor {expected}: one number for every weight")


def check_memory(rows: int, d: int, dtype: torch.dtype, device: torch.device) -> None:
    """ValueError unless `rows` gradients of `d` weights fit into the memory that is free on the device."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    needed = rows * d * dtype.itemsize
    if needed > free:
        raise ValueError(
            f"{rows} gradients of {d:,} weights in {str(dtype).removeprefix('torch.')} take {needed / 1e9:,.1f} GB, but {free / 1e9:,.1f} GB "
            f"are available on {device}; take a smaller window or storage_dtype=torch.bfloat16"
        )
