"""A torch model seen as one flat vector of parameters, and the gradient of its loss there, for one client or for many at once."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

Loss = Callable[[Any, Tensor], Tensor]
cross_entropy = partial(F.cross_entropy, reduction="none")  # a loss for each example [B]


class FlatModel:
    """A model's trainable parameters as one flat vector [d].

    Args:
        model: a torch module; its parameters must share one dtype. Parameters without `requires_grad` are constants, and so are buffers
            that are not saved with the model. Half-precision models are held, and averaged, in float32.
        loss_fn: `loss_fn(output, y)`: the losses of the examples [B], or their mean. Training many clients at once needs the former
            where their batches differ in size.
        buffers: "average" lets the server average buffers such as BatchNorm's statistics; None refuses a model that has some.

    Raises:
        ValueError: a layer keeps floating-point statistics and `buffers` is None, the parameters' dtypes differ, or two parameters
            share memory without being one (a transposed weight, say): trained apart they would come apart.

    Examples:
        >>> flat = FlatModel(nn.Linear(2, 3))
        >>> flat.size, flat.gradient(torch.zeros(9), torch.ones(4, 2), torch.tensor([0, 1, 2, 2])).shape
        (9, torch.Size([9]))
    """

    def __init__(self, model: nn.Module, loss_fn: Loss = cross_entropy, buffers: Literal["average"] | None = None) -> None:
        if buffers not in (None, "average"):
            raise ValueError(f"buffers is {buffers!r}; expected None or 'average'")
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        if len(dtypes := {parameter.dtype for parameter in trained.values()}) != 1:
            raise ValueError(f"the trainable parameters have the dtypes {sorted(map(str, dtypes))}; expected one: model.to(torch.float32)")
        check_apart(trained)
        saved = model.state_dict().keys()
        kept = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point() and name in saved}
        if kept and buffers is None:
            layer = next(iter(kept)).rpartition(".")[0] or "the model"
            raise ValueError(
                f"layer {layer!r} ({type(model.get_submodule(layer) if layer != 'the model' else model).__name__}) keeps statistics that are "
                "no parameters, and clients would disagree on them; use GroupNorm, or say buffers='average' to average them"
            )
        self.model, self.loss_fn, self.averages_buffers = model, loss_fn, bool(kept)
        self.shapes = {name: parameter.shape for name, parameter in trained.items()}
        self.sizes = [shape.numel() for shape in self.shapes.values()]
        self.size, self.held = sum(self.sizes), dtypes.pop()
        self.dtype = torch.promote_types(self.held, torch.float32)  # of flat vectors: sums and small steps need more than half precision
        self.buffer_shapes = {name: buffer.shape for name, buffer in kept.items()}
        self.tied = {**tied_names(model.named_parameters, self.shapes), **tied_names(model.named_buffers, self.buffer_shapes)}
        self._own = threading.local()  # a module a thread, its parameters views of one buffer

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_own"}  # made again where it is needed

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _own=threading.local())

    def initial(self) -> Float[Tensor, "d"]:
        """The model's parameters as they are."""
        return self.vector_of(dict(self.model.named_parameters()))

    def vector_of(self, named: Mapping[str, Tensor]) -> Float[Tensor, "d"]:
        """The flat vector of named parameters (more names than the model's do no harm)."""
        return torch.cat([named[name].detach().reshape(-1) for name in self.shapes]).to(self.dtype)

    def named(self, vector: Float[Tensor, "d"]) -> dict[str, Tensor]:
        """The parameters in a flat vector by their names, as views."""
        parts = vector.split(self.sizes)
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def state_dict(self, vector: Float[Tensor, "d"]) -> dict[str, Tensor]:
        """A copy of the parameters in a flat vector as `model.state_dict()` names them: tied ones under each of their names."""
        named = {name: part.clone() for name, part in self.named(vector).items()}
        return named | {name: named[first] for name, first in self.tied.items() if first in named}

    def _bound(self) -> tuple[nn.Module, Tensor, list[nn.Parameter]]:
        """This thread's module, the buffer that its parameters are views of, and those parameters."""
        if not hasattr(self._own, "bound"):
            module = copy.deepcopy(self.model).train()
            buffer = self.initial().to(self.held)
            parameters = dict(module.named_parameters())
            for name, view in self.named(buffer).items():
                parameters[name].data = view
            self._own.bound = module, buffer, [parameters[name] for name in self.shapes]
        return self._own.bound

    def module_at(self, vector: Float[Tensor, "d"]) -> nn.Module:
        """This thread's module, in training mode, with the parameters of a flat vector until the next call sets others."""
        module, buffer, _ = self._bound()
        buffer.copy_(vector)
        return module

    def gradient(self, vector: Float[Tensor, "d"], x: Any, y: Tensor) -> Float[Tensor, "d"]:
        """The gradient of the mean loss of a batch."""
        module, parameters = self.module_at(vector), self._bound()[2]
        with torch.enable_grad():
            loss = self.loss_fn(module(x), y).mean()
            grads = torch.autograd.grad(loss, parameters)
        return torch.cat([each.reshape(-1) for each in grads]).to(self.dtype)

    def stacked_gradient(
        self, vectors: Float[Tensor, "S d"], x: Tensor, y: Tensor, weights: Float[Tensor, "S B"] | None
    ) -> Float[Tensor, "S d"]:
        """The gradients of S clients, each at its own vector and on its own batch, at once.

        Args:
            vectors: parameters [S, d].
            x, y: batches [S, B, ...].
            weights: of each example in its client's loss [S, B], adding up to 1 a client; None: the mean.

        Raises:
            ValueError: weights are given and the loss is a mean already.
        """
        if self.averages_buffers:
            raise ValueError("buffers='average' with clients trained at once; expected a model without statistics: train by executor=None")
        module = self._bound()[0]

        def loss(vector: Tensor, x: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
            losses = self.loss_fn(functional_call(module, self.named(vector.to(self.held)), (x,)), y)
            if weights is None:
                return losses.mean()
            if losses.ndim == 0:
                raise ValueError("loss_fn gives one number a batch; expected one an example [B] to train clients of unlike sizes at once")
            return losses.to(weights.dtype) @ weights

        arguments = (vectors, x, y) if weights is None else (vectors, x, y, weights)
        return vmap(grad(loss), randomness="different")(*arguments)

    @torch.no_grad()
    def predict(self, vector: Float[Tensor, "d"], x: Tensor, buffers: Tensor | None = None, batch: int = 1024) -> Tensor:
        """The model's output in evaluation mode at a vector."""
        module = copy.deepcopy(self.model).eval()
        module.load_state_dict(self.named(vector), strict=False)
        if buffers is not None:
            self.load_buffers(module, buffers)
        return torch.cat([module(part) for part in x.split(batch)])

    def buffers(self) -> Tensor:
        """This thread's module's averaged buffers, flat [b]."""
        return self._flat_buffers(self._bound()[0])

    def initial_buffers(self) -> Tensor:
        """The model's buffers as they are, flat [b]."""
        return self._flat_buffers(self.model)

    def _flat_buffers(self, module: nn.Module) -> Tensor:
        named = dict(module.named_buffers())
        flat = torch.cat([named[name].detach().reshape(-1) for name in self.buffer_shapes])
        return flat.to(torch.promote_types(flat.dtype, torch.float32))

    def load_buffers(self, module: nn.Module | None, flat: Tensor) -> None:
        """Set a module's (this thread's, where None) averaged buffers."""
        named = dict((module or self._bound()[0]).named_buffers())
        parts = flat.split([shape.numel() for shape in self.buffer_shapes.values()])
        for (name, shape), part in zip(self.buffer_shapes.items(), parts, strict=True):
            named[name].copy_(part.view(shape))


def tied_names(named: Callable[..., Iterable[tuple[str, Tensor]]], first: Mapping[str, Any]) -> dict[str, str]:
    """name -> the first name of the same tensor, for each further name that one of the `first` ones has."""
    names = {id(tensor): name for name, tensor in named() if name in first}
    every = named(remove_duplicate=False)
    return {name: names[id(tensor)] for name, tensor in every if id(tensor) in names and name not in first}


def check_apart(parameters: Mapping[str, Tensor]) -> None:
    """ValueError where two parameters lie in the same memory."""
    places = [(each.data_ptr(), name, each) for name, each in parameters.items() if each.numel() and each.device.type != "meta"]
    for (start, name, one), (after, other, _) in itertools.pairwise(sorted(places, key=lambda place: place[0])):
        if after <= start + sum((size - 1) * step for size, step in zip(one.shape, one.stride(), strict=True)) * one.itemsize:
            raise ValueError(
                f"the parameters {name!r} and {other!r} share memory but are two; expected one parameter under both names "
                "(model.b.weight = model.a.weight), or memory of their own: parameter.data = parameter.data.clone()"
            )
