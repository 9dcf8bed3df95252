"""Where and when to skip, from a little text: cold regions by the layers' mean similarity, the threshold by the share that is wanted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn

from fewer.checks import check_whole, is_number
from fewer.fitting import evaluating
from fewer.language._shared.prenorm import check_structure, decoder_of, layers_of, observed
from fewer.language.ffn_skip.config import FFNSkipConfig
from fewer.language.ffn_skip.skipping import read, reading
from fewer.language.ffn_skip.tokens import similarity

STEPS = 30  # of the bisection
AT_ONCE = 4096  # tokens of a pass


@dataclass(frozen=True, eq=False)
class CalibrationReport:
    """What `calibrate` found.

    Attributes:
        similarity: s_l, float64 [L]: the mean over the calibration tokens of cos(h', h' + FFN(norm2(h'))), all layers run in full.
        influence: float64 [L]: the mean of 1 - cos(h, h_out) of whole layers.
        window: (cold_start, cold_end).
        widened: by how many layers the window was widened to reach the target.
        threshold: theta.
        target, achieved_ratio: the share of all FFN blocks to skip, and the one that these tokens skip at this threshold.
        tokens: how many were looked at.
    """

    similarity: Float64[Tensor, "L"]
    influence: Float64[Tensor, "L"]
    window: tuple[int, int]
    widened: int
    threshold: float
    target: float
    achieved_ratio: float
    tokens: int

    @property
    def reached(self) -> bool:
        """Whether the calibration tokens skip as much as was asked for."""
        return self.achieved_ratio >= self.target


def calibrate(
    model: nn.Module, input_ids: Int64[Tensor, "B S"], target_skip: float = 0.25, tokens: int = 128, *, steps: int = STEPS
) -> tuple[FFNSkipConfig, CalibrationReport]:
    """Settings with which about `target_skip` of all FFN blocks after the warm-up are skipped.

    Args:
        model: see `enable_ffn_skip`; not enabled.
        input_ids: texts of the kind that will be decoded. All but the last `tokens` of each are the prompt.
        target_skip: the share of all FFN blocks (the cold layers' too), in [0, 1).
        tokens: how many last tokens of each text are looked at.
        steps: of the bisection; 0 leaves the threshold at -1.

    Returns:
        the settings (a warm-up of 25, no limit of skips), and what they were found from.

    Raises:
        ValueError: fewer than two tokens, a target outside [0, 1), fewer than three layers, similarities that are not finite.

    Examples:
        >>> from fewer.tasks import micro_lm
        >>> text = torch.randint(1, 2048, (2, 64), generator=torch.Generator().manual_seed(0))
        >>> config, report = calibrate(micro_lm(), text, target_skip=0.2, tokens=48)
        >>> abs(report.achieved_ratio - 0.2) < 0.02, len(report.similarity)
        (True, 4)
    """
    if not is_number(target_skip) or not 0 <= target_skip < 1:
        raise ValueError(f"target_skip is {target_skip!r}; expected a share of at least 0 and below 1")
    check_whole(1, tokens=tokens)
    if input_ids.dim() != 2 or input_ids.numel() < 2:
        raise ValueError(f"input_ids is {tuple(input_ids.shape)}; expected at least 2 tokens [B, S] to calibrate on: give more text")
    decoder, starts = decoder_of(model), max(0, input_ids.shape[1] - tokens)
    layers = len(layers_of(decoder))
    if layers < 3:
        raise ValueError(f"the model has {layers} layers; expected at least 3: the first and the last always run in full")
    check_structure(decoder)
    input_ids = input_ids.to(decoder.get_input_embeddings().weight.device)
    with evaluating(model):
        similarities, influence = layer_means(decoder, input_ids, starts)
        window = cold_regions(similarities.tolist())
        start, end = widened(window, similarities.tolist(), target_skip)
        lowest = FFNSkipConfig(start, end, threshold=-1.0, num_layers=layers)
        theta, achieved = find_threshold(decoder, input_ids, lowest, target_skip, starts, steps)
    wider, looked_at = end - start - (window[1] - window[0]), input_ids[:, starts:].numel()
    report = CalibrationReport(similarities, influence, (start, end), wider, theta, target_skip, achieved, looked_at)
    return dataclasses.replace(lowest, threshold=theta), report


def cold_regions(similarities: Sequence[float]) -> tuple[int, int]:
    """[cold_start, cold_end): the longest run of layers around the most similar inner one that are as similar as the mean or more.

    >>> cold_regions([0.2, 0.9, 0.5, 0.8, 0.95, 0.9, 0.3])
    (3, 6)
    """
    last, mean = len(similarities) - 1, sum(similarities) / len(similarities)
    start = max(range(1, last), key=lambda layer: similarities[layer])
    end = start + 1
    while start > 1 and similarities[start - 1] >= mean:
        start -= 1
    while end < last and similarities[end] >= mean:
        end += 1
    return start, end


def widened(window: tuple[int, int], similarities: Sequence[float], target: float) -> tuple[int, int]:
    """The window, a layer wider at a time at its more similar side until it can reach the target: one of w layers can skip w - 1.

    >>> widened((3, 6), [0.2, 0.9, 0.5, 0.8, 0.95, 0.9, 0.3], target=0.4)
    (2, 6)
    """
    (start, end), layers = window, len(similarities)
    while (end - start - 1) / layers < target and (start > 1 or end < layers - 1):
        if end == layers - 1 or (start > 1 and similarities[start - 1] >= similarities[end]):
            start -= 1
        else:
            end += 1
    return start, end


def find_threshold(
    decoder: nn.Module, input_ids: Tensor, config: FFNSkipConfig, target: float, starts: int, steps: int = STEPS
) -> tuple[float, float]:
    """(theta, the ratio skipped at it): the lower end of a bisection between one that reaches the target and one that does not.

    The ratio is a step function of theta and not quite monotone, as what one token skips alters the keys that later ones read; the lower
    end has been tried, so what is given back reaches the target wherever -1 does.
    """
    low, high = config.threshold, 1.0  # a cosine's ends
    achieved = skipped_ratio(decoder, input_ids, config, starts)
    if achieved < target:
        return low, achieved
    for _ in range(steps):
        middle = (low + high) / 2
        ratio = skipped_ratio(decoder, input_ids, dataclasses.replace(config, threshold=middle), starts)
        if ratio >= target:
            low, achieved = middle, ratio
        else:
            high = middle
    return low, achieved


def skipped_ratio(decoder: nn.Module, input_ids: Tensor, config: FFNSkipConfig, starts: int) -> float:
    """The share of all FFN blocks that tokens from a column on skip when the texts are read."""
    with reading(decoder, config, starts) as stats:
        for part in input_ids.split(max(1, AT_ONCE // input_ids.shape[1])):
            read(decoder, part)
    return stats.ratio


def layer_means(decoder: nn.Module, input_ids: Tensor, starts: int) -> tuple[Float64[Tensor, "L"], Float64[Tensor, "L"]]:
    """(s_l, mean of 1 - cos(h, h_out)) of every layer over tokens from a column on, all run in full."""
    layers = layers_of(decoder)
    sums = torch.zeros(2, len(layers), dtype=torch.float64)

    def see(number: int, seen: Mapping[str, Tensor]) -> None:
        for which, before in enumerate(("middle", "h")):
            sums[which, number] += similarity(seen[before][:, starts:], seen["h_out"][:, starts:]).double().sum().cpu()

    with observed(layers, see):
        for part in input_ids.split(max(1, AT_ONCE // input_ids.shape[1])):
            read(decoder, part)
    of_ffn, of_layers = sums / input_ids[:, starts:].numel()
    if not bool(torch.isfinite(sums).all()):
        raise ValueError("the layers' states are not finite; expected a model that gives finite ones on this text (try float32)")
    return of_ffn, 1 - of_layers
