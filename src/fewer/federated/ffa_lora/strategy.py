"""FFA-LoRA for Flower: the strategy of the ServerApp, and the ClientApp."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from logging import INFO, getLogger
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fewer.federated._shared.flat_model import Loss, cross_entropy
from fewer.federated._shared.flower import FlowerStrategy
from fewer.federated._shared.flower_clients import LoadData, flower_client_app
from fewer.federated._shared.flower_records import METRICS
from fewer.federated.ffa_lora.adapters import agreement
from fewer.federated.ffa_lora.algorithm import FedLoRA, LoRARoundsConfig

log = getLogger("flwr").log


def trained_arrays(peft_model: nn.Module) -> ArrayRecord:
    """What travels: the trained parameters alone, by their names, those of half precision in float32. `model.load_state_dict(arrays.to_torch_state_dict(), strict=False)` puts
    them back.

    Examples:
        >>> list(trained_arrays(nn.Linear(2, 1)))
        ['weight', 'bias']
    """
    trained = {name: each.detach().cpu() for name, each in peft_model.named_parameters() if each.requires_grad}
    return ArrayRecord({name: Array(each.to(torch.promote_types(each.dtype, torch.float32)).numpy()) for name, each in trained.items()})


class FFALoRA(FlowerStrategy):
    """Federated LoRA as a Flower strategy: FFA-LoRA with models whose A `freeze_a` froze, plain LoRA with others.

    Before its first round each client's adapters are compared with the others' (see `adapter_fingerprint`). The round's metrics hold
    "epsilon", the largest that a client has spent so far.

    Args:
        config: the settings, the same as the clients'.
        fraction_train: each client takes part in a round with this probability (redrawn if none does).
        min_available_nodes: the strategy waits until so many nodes are there.
        keywords: `fraction_evaluate`, `seed`, `sampler`, `clients`, `checkpoint` (see `FlowerStrategy`).

    Raises:
        ValueError: (when started) the clients' adapters differ: both fingerprints, and the first layer that differs.

    Examples:
        >>> strategy = FFALoRA(LoRARoundsConfig(lr=0.1))
        >>> strategy.algorithm.config.lr
        0.1

        In a ServerApp: `strategy.start(grid, initial_arrays=trained_arrays(model), num_rounds=10)`.
    """

    def __init__(
        self, config: LoRARoundsConfig | None = None, fraction_train: float = 1.0, min_available_nodes: int = 2, **keywords: Any
    ) -> None:
        super().__init__(FedLoRA(config or LoRARoundsConfig()), fraction_train, min_available_nodes=min_available_nodes, **keywords)
        self._spent = 0.0  # the largest epsilon that any client has told

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The mean of what came back; of the epsilons the largest, as no client's guarantee is another's."""
        replies = list(replies)
        told = [reply.content.metric_records.get(METRICS, {}) for reply in replies if not reply.has_error()]
        spent = [float(each["epsilon"]) for each in told if "epsilon" in each]  # pyright: ignore[reportArgumentType] - a number
        self._spent = max([self._spent, *spent])
        arrays, metrics = super().aggregate_train(server_round, replies)
        if spent:
            log(INFO, "epsilon spent so far: %.3g", self._spent)
        if metrics is not None and spent:
            metrics["epsilon"] = self._spent
        return arrays, metrics

    def _remembered(self) -> dict[str, Tensor]:
        return super()._remembered() | {"spent": torch.tensor(self._spent, dtype=torch.float64)}

    def _recall(self, kept: dict[str, Tensor]) -> None:
        super()._recall(kept)
        self._spent = float(kept["spent"])


def ffa_lora_client_app(
    model_fn: Callable[[], nn.Module],
    load_data: LoadData,
    loss_fn: Loss = cross_entropy,
    config: LoRARoundsConfig | None = None,
    **keywords: Any,
) -> ClientApp:
    """Federated LoRA's clients as a Flower ClientApp; how many rounds a client has taken part in lies in `context.state`.

    Args:
        model_fn: makes the peft model, `freeze_a(get_peft_model(...), seed)`.
        load_data: `load_data(context)`: the client's examples (x [n, ...], y [n, ...]).
        loss_fn: `loss_fn(output, y)`: the losses of the examples [B].
        config: the settings, the same as the strategy's.
        keywords: `load_test` and more of `flower_client_app`. What it gives is judged as it is, without noise, so it should be nobody's secret; with
            privacy and without it a client tells no loss and no accuracy, as those of its own examples are not covered by the budget.

    Warns:
        UserWarning: noise is drawn from the seed that the server sends, which is no privacy from the server.

    Examples:
        >>> import torch
        >>> app = ffa_lora_client_app(lambda: nn.Linear(2, 2), lambda context: (torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])))
    """
    config = config or LoRARoundsConfig()
    if config.privacy is not None and config.privacy.noise_multiplier != 0 and not config.privacy.secure:
        warnings.warn(
            "noise and batches follow the seed that the server sends, so that the server can take the noise away; expected secure=True where "
            "data is private (a seed is for studies): PrivacyConfig(..., secure=True)",
            stacklevel=2,
        )
    if config.privacy is not None and keywords.get("load_test") is None:
        keywords["load_test"] = lambda context: tuple(part[:0] for part in load_data(context))
    return flower_client_app(FedLoRA(config), model_fn, load_data, loss_fn, agree=agreement, **keywords)
