"""What the wire carries: numbers a client and round by message, and from how many sent examples on it is more than full fine-tuning's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fewer.checks import check_positive, check_share, check_whole
from fewer.federated._shared.traffic import ideal_bytes
from fewer.federated.sfprompt.split_model import ClientModel


@dataclass(frozen=True)
class Cost:
    """Numbers (4 bytes each at float32) that a client and the server exchange in a round.

    Attributes:
        numbers: SFPrompt's, by kind of message (as `Wire` counts them).
        sent_examples: examples whose activations are sent.
        split_federated: of split training without a first phase and pruning, over as many epochs as `local_epochs` says.
        full: of full fine-tuning, which moves the whole model down and up.
        prompt_tuning: of federated prompt tuning, on a device that can hold the whole model: prompt and tail alone.
        break_even: the most examples that may be sent before SFPrompt moves more than full fine-tuning.
    """

    numbers: dict[str, int]
    sent_examples: int
    split_federated: int
    full: int
    prompt_tuning: int
    break_even: int

    @property
    def total(self) -> int:
        return sum(self.numbers.values())

    @property
    def bytes(self) -> int:
        """At float32, what messages are wrapped in left out."""
        return ideal_bytes(self.total)

    @property
    def ratio(self) -> float:
        """SFPrompt's numbers over those of full fine-tuning."""
        return self.total / self.full


def kept_count(examples: int, keep: float) -> int:
    """How many examples are left of n: max(1, round(keep n))."""
    return max(1, round(keep * examples))


def wire_cost(
    model: ClientModel, examples: int, keep: float = 0.5, *, split_epochs: int = 1, batch_size: int = 30, local_epochs: int = 2
) -> Cost:
    """What a client of so many examples and the server exchange in a round.

    With T numbers of an example at the cut (tokens x D, the prompt's tokens counted), the four messages of an example carry T each where
    the prompt goes in at the input. At the cut the activations lack the prompt (T - P D), the prompt goes up and its gradient down once a
    batch (P D each), and b and its gradient carry T, or D where the tail reads the class token alone. Without a prompt nothing is sent back.

    Args:
        model: the split model, or a client's part of it.
        examples: n.
        keep: the share of them that is sent.
        split_epochs: passes over those.
        batch_size: examples a batch.
        local_epochs: U, of the split training that SFPrompt is held against.

    Raises:
        ValueError: a number is out of its range, or the model does not say how many tokens an example has.

    Examples:
        >>> from torch import nn
        >>> from fewer.federated import SplitModel
        >>> head, body, tail = nn.Linear(3, 8).requires_grad_(False), nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 2)
        >>> model = SplitModel(head, body, tail, prompt_tokens=1, at="cut", width=8, tokens=5)
        >>> cost = wire_cost(model, examples=10, keep=0.5)
        >>> cost.numbers["smashed"], cost.numbers["output"], cost.prompt_tuning
        (200, 240, 52)
    """
    check_whole(examples=examples, split_epochs=split_epochs, batch_size=batch_size, local_epochs=local_epochs)
    check_positive(keep=keep)
    check_share(keep=keep)
    if model.tokens is None:
        raise ValueError("the model does not say how many tokens an example has; expected SplitModel(..., tokens=...)")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    full, sent = 2 * model.whole_size, kept_count(examples, keep)

    def total(sent: int, epochs: int) -> int:
        return 2 * trained + sum(split_numbers(model, sent, epochs, batch_size).values())

    numbers = {"model_down": trained, **split_numbers(model, sent, split_epochs, batch_size), "model_up": trained}
    most = largest(lambda count: total(count, split_epochs) <= full)
    return Cost(numbers, sent, total(examples, local_epochs), full, 2 * trained, most)


def split_numbers(model: ClientModel, sent: int, epochs: int, batch_size: int) -> dict[str, int]:
    """What the exchange of activations and gradients of so many examples carries, by kind."""
    assert model.tokens is not None
    prompt, real = model.prompt_tokens * model.width, model.tokens * model.width
    passes, batches = sent * epochs, -(-sent // batch_size) * epochs
    out = (model.width if model.class_token_only else real + prompt) * passes
    if model.at == "input":
        up = (real + prompt) * passes
        back = {"output_gradient": out, "returned_gradient": up} if prompt else {}
        return {"smashed": up, "output": out, **back}
    back = {"output_gradient": out, "returned_gradient": prompt * batches} if prompt else {}
    return {"smashed": real * passes, **({"prompt": prompt * batches} if prompt else {}), "output": out, **back}


def largest(holds: Callable[[int], bool]) -> int:
    """The largest whole number from 1 on for which it holds, where it holds up to some number and never after; 0 where it never does."""
    high = 1
    while holds(high):
        high *= 2
    low = high // 2  # holds there, or is 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
