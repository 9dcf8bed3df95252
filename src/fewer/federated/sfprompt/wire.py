"""The wire between client and server, and the server's part of split training: the body, forward and backward."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from jaxtyping import Float
from torch import Tensor, nn

from fewer.checks import check_positive, check_whole
from fewer.federated._shared.flower_records import tensor_of

VALUE, BITS = "value", "bfloat16"
Smashed = tuple[Tensor, Tensor | None]  # activations [B, T, D], and the prompt [P, D] where it goes in at the cut


def insert_prompt(tokens: Float[Tensor, "B T D"], prompt: Float[Tensor, "P D"] | None) -> Float[Tensor, "B T+P D"]:
    """The tokens with the prompt's after the class token.

    Examples:
        >>> insert_prompt(torch.zeros(1, 3, 1), torch.ones(2, 1)).flatten().tolist()
        [0.0, 1.0, 1.0, 0.0, 0.0]
    """
    if prompt is None:
        return tokens
    return torch.cat([tokens[:, :1], prompt.to(tokens.dtype).expand(len(tokens), -1, -1), tokens[:, 1:]], dim=1)


@dataclass(frozen=True, eq=False)
class _Passed:
    """A forward pass that waits for its gradients."""

    inputs: dict[Hashable, Tensor]
    outputs: dict[Hashable, Tensor]
    since: float


class BodyServer:
    """The frozen body: forward passes for clients, each kept until its gradient comes; no weight gradients are made.

    What it sees are activations, never labels or examples; yet activations after one block can be inverted, so this is no guarantee of
    privacy.

    Args:
        body: frozen; tokens [B, T, D] -> tokens. It is put into evaluation mode.
        class_token_only: hand back the class token alone.
        shape: (tokens, D) of an example's activations as a client sends them; None: any.
        tokens: of an example as the body reads them, the prompt's with them; None: any.
        timeout: seconds after which a pass whose gradient has not come is dropped, at the next call.

    Raises:
        ValueError: the body is not frozen, or has BatchNorm in training mode.

    Examples:
        >>> server = BodyServer(nn.Linear(2, 2).requires_grad_(False))
        >>> server.forward(0, torch.ones(3, 4, 2)).shape, server.backward(0, torch.ones(3, 4, 2)).shape, server.waiting
        (torch.Size([3, 4, 2]), torch.Size([3, 4, 2]), [])
    """

    def __init__(
        self,
        body: nn.Module,
        class_token_only: bool = False,
        *,
        shape: tuple[int, int] | None = None,
        tokens: int | None = None,
        timeout: float = 3600.0,
    ) -> None:
        check_frozen("body", body)
        check_positive(timeout=timeout)
        check_whole(optional=["tokens"], tokens=tokens)
        self.body, self.class_token_only, self.shape, self.tokens, self.timeout = body.eval(), class_token_only, shape, tokens, timeout
        self._passed: dict[Hashable, _Passed] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_passed": {}}  # a graph cannot be copied, and its client is not the copy's

    @property
    def waiting(self) -> list[Hashable]:
        """The ids whose gradients have not come."""
        return list(self._passed)

    def forward(self, id: Hashable, smashed: Tensor, prompt: Tensor | None = None, *, keep: bool = True) -> Float[Tensor, "B T D"]:
        """b = body(a) of one batch; see `forward_all`."""
        return self.forward_all({id: (smashed, prompt)}, keep=keep)[id]

    def backward(self, id: Hashable, gradient: Float[Tensor, "B T D"]) -> Tensor:
        """dL/da of one batch; see `backward_all`."""
        return self.backward_all({id: gradient})[id]

    def forward_all(self, parts: Mapping[Any, Smashed], *, keep: bool = True) -> dict[Any, Float[Tensor, "B T D"]]:
        """The body's outputs for the batches of some clients, in one pass over the concatenation of those that have as many tokens.

        Args:
            parts: id -> (activations [B, T, D], and the prompt [P, D] where it is put in at the cut). An id that waits is replaced.
            keep: False: no gradient will come.

        Raises:
            ValueError: activations are of another shape than announced, or no floating-point numbers.
        """
        check_frozen("body", self.body)
        self._forget_old()
        for id, part in parts.items():
            if fault := self.fault_of(*part):
                raise ValueError(f"{id}: {fault}")
        alike: dict[torch.Size, dict[Hashable, Smashed]] = {}
        for id, (smashed, prompt) in parts.items():
            alike.setdefault(insert_prompt(smashed[:1], prompt).shape[1:], {})[id] = smashed, prompt
        outputs = {id: output for group in alike.values() for id, output in self._pass(group, keep).items()}
        return {id: outputs[id] for id in parts}

    def _pass(self, parts: Mapping[Hashable, Smashed], keep: bool) -> dict[Hashable, Tensor]:
        """One pass over batches whose examples have as many tokens, in the body's own precision."""
        place: Any = next(self.body.parameters(), next(iter(parts.values()))[0])
        dtype = place.dtype if place.is_floating_point() else None
        inputs, tokens = {}, {}
        with torch.set_grad_enabled(keep):
            for id, (smashed, prompt) in parts.items():
                smashed = smashed.detach().to(place.device, dtype)
                inputs[id] = (smashed if prompt is None else prompt.detach().to(smashed)).requires_grad_(keep)
                tokens[id] = inputs[id] if prompt is None else insert_prompt(smashed, inputs[id])
            b = self.body(torch.cat(list(tokens.values())))
            b = b[:, :1] if self.class_token_only else b
            outputs = dict(zip(tokens, b.split([len(each) for each in tokens.values()]), strict=True))
        if keep:
            self._passed.update(dict.fromkeys(parts, _Passed(inputs, outputs, time.monotonic())))
        return {id: output.detach() for id, output in outputs.items()}

    def backward_all(self, gradients: Mapping[Any, Float[Tensor, "B T D"]]) -> dict[Any, Tensor]:
        """What the body hands back for dL/db: dL/da [B, T, D], or dL/dp [P, D] summed over the batch where the prompt went in at the cut.

        The passes are dropped, and with a pass over several clients' batches those of the clients whose gradients are not here.

        Raises:
            ValueError: no forward pass of that id waits, or the gradient is of another shape than what it is of.
        """
        for id, gradient in gradients.items():
            if id not in self._passed:
                raise ValueError(
                    f"no forward pass of {id} waits for a gradient (it came already, or too late); expected one of {self.waiting}"
                )
            if gradient.shape != (expected := self._passed[id].outputs[id].shape):
                raise ValueError(
                    f"{id}: the output's gradient is of shape {tuple(gradient.shape)}; expected {tuple(expected)}, as it was sent"
                )
        back: dict[Hashable, Tensor] = {}
        for passed in self._groups(gradients):
            here = [id for id in passed.outputs if id in gradients and self._passed.get(id) is passed]
            outputs = [passed.outputs[id] for id in here]
            sent = [gradients[id].to(output) for id, output in zip(here, outputs, strict=True)]
            back |= dict(zip(here, torch.autograd.grad(outputs, [passed.inputs[id] for id in here], sent), strict=True))
            self.drop([id for id, each in list(self._passed.items()) if each is passed])
        return back

    def _groups(self, ids: Iterable[Hashable]) -> list[_Passed]:
        """The passes that some ids belong to, each once."""
        found: list[_Passed] = []
        for id in ids:
            if not any(self._passed[id] is each for each in found):
                found.append(self._passed[id])
        return found

    def drop(self, ids: Sequence[Hashable]) -> None:
        """Forget the forward passes of some ids."""
        for id in list(ids):
            self._passed.pop(id, None)

    def fault_of(self, smashed: Tensor, prompt: Tensor | None = None) -> str:
        """What is wrong with what a client sent, in words; empty where nothing is."""
        if smashed.ndim != 3 or (self.shape is not None and tuple(smashed.shape[1:]) != self.shape):
            expected = "[B, tokens, D]" if self.shape is None else f"[B, {self.shape[0]}, {self.shape[1]}]"
            return f"activations of shape {tuple(smashed.shape)}; expected {expected}, as the model was cut"
        if not smashed.is_floating_point() or (prompt is not None and not prompt.is_floating_point()):
            return f"{(smashed if prompt is None else prompt).dtype} numbers; expected floating-point ones"
        if prompt is not None and (prompt.ndim != 2 or prompt.shape[1] != smashed.shape[2]):
            return f"a prompt of shape {tuple(prompt.shape)}; expected [P, {smashed.shape[2]}]"
        count = smashed.shape[1] + (0 if prompt is None else len(prompt))
        if self.tokens is not None and count != self.tokens:
            return f"{count} tokens, its prompt's with them; expected {self.tokens}, as the model was cut"
        return ""

    def _forget_old(self) -> None:
        now = time.monotonic()
        self.drop([id for id, passed in list(self._passed.items()) if now - passed.since > self.timeout])


def check_frozen(name: str, part: nn.Module) -> None:
    """ValueError naming a parameter that is trained, or a BatchNorm whose statistics would change."""
    for path, parameter in part.named_parameters():
        if parameter.requires_grad:
            raise ValueError(f"the {name} trains {path!r}; expected a frozen {name}: {name}.requires_grad_(False)")
    for path, module in part.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise ValueError(
                f"layer {path!r} ({type(module).__name__}) of the {name} is in training mode, where its statistics change; expected {name}.eval()"
            )


class Wire:
    """A client's way to the body in this process: every tensor is serialised as Flower's messages are, counted, and read again.

    Args:
        server: the body's.

    Attributes:
        numbers, bytes: what travelled, by kind: "model_down", "smashed", "prompt" (at the cut alone), "output", "output_gradient",
            "returned_gradient" (dL/da, or dL/dp at the cut), "model_up".

    Examples:
        >>> wire = Wire(BodyServer(nn.Linear(2, 2).requires_grad_(False)))
        >>> wire.forward(0, torch.ones(3, 4, 2)).shape, dict(wire.numbers)
        (torch.Size([3, 4, 2]), {'smashed': 24, 'output': 24})
    """

    def __init__(self, server: BodyServer) -> None:
        self.server = server
        self.numbers, self.bytes = Counter[str](), Counter[str]()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def send(self, kind: str, tensor: Tensor) -> Tensor:
        """The tensor as it comes out at the other end."""
        sent = recorddict_to_proto(RecordDict({kind: tensor_record(tensor)})).SerializeToString()
        with self._lock:
            self.numbers[kind] += tensor.numel()
            self.bytes[kind] += len(sent)
        arrived = recorddict_from_proto(RecordDictProto.FromString(sent)).array_records[kind]
        return read_tensor(arrived).to(tensor.device)

    def forward(self, client: Hashable, smashed: Tensor, prompt: Tensor | None = None, *, keep: bool = True) -> Tensor:
        """Send activations (and at the cut the prompt), get the body's output."""
        smashed = self.send("smashed", smashed)
        prompt = None if prompt is None else self.send("prompt", prompt)
        return self.send("output", self.server.forward(client, smashed, prompt, keep=keep))

    def backward(self, client: Hashable, gradient: Tensor) -> Tensor:
        """Send dL/db, get dL/da, or dL/dp at the cut."""
        return self.send("returned_gradient", self.server.backward(client, self.send("output_gradient", gradient)))


def tensor_record(tensor: Tensor) -> ArrayRecord:
    """A tensor as a record; NumPy knows no bfloat16, which goes as its bits."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return ArrayRecord({BITS: Array(tensor.view(torch.int16).numpy())})
    return ArrayRecord({VALUE: Array(tensor.numpy())})


def read_tensor(record: ArrayRecord) -> Tensor:
    """The tensor in a record, in memory of its own."""
    if BITS in record:
        return tensor_of(record[BITS]).clone().view(torch.bfloat16)
    return tensor_of(record[VALUE]).clone()
