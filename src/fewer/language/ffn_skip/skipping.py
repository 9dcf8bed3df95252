"""Skipping on a model of transformers: its layers' forward leaves out feed-forward blocks while it decodes; `generate` is called as before.

Modules, weights and the cache's layout stay as they are. The model decodes one thing at a time: two threads may not share it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from fewer.language._shared.prenorm import StandIn, check_structure, decoder_of, ffn_flops, layers_of
from fewer.language.ffn_skip.config import FFNSkipConfig
from fewer.language.ffn_skip.stats import FFNSkipStats
from fewer.language.ffn_skip.tokens import Tokens

SKIPPER = "_ffn_skipper"  # the attribute of a decoder that is enabled
PROMPT = "_ffn_skip_prompt"  # the attribute of a cache: how many entries the prompt made


class SkippingLayer(StandIn):
    """What a decoder layer's forward goes through while skipping is enabled."""

    def __init__(self, layer: nn.Module, number: int, skipper: Skipper) -> None:
        super().__init__(layer)
        self.number, self.skipper = number, skipper

    def forward(self, hidden_states: Float[Tensor, "B T H"], *args: Any, **kwargs: Any) -> Float[Tensor, "B T H"]:
        """h' = h + Attn(norm1(h)); h_out = h' + FFN(norm2(h')) for tokens that do not skip, h' for those that do."""
        tokens = self.skipper.tokens
        if tokens is None or not tokens.config.cold_start <= self.number < tokens.config.cold_end:
            return self.plain(hidden_states, *args, **kwargs)
        if tokens.config.mode == "layers":
            return self._whole_layer(hidden_states, tokens.skip(self.number), *args, **kwargs)
        layer: Any = self.layer
        kwargs |= self.named(args)
        attended, *_ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
        h = hidden_states + attended
        skip = tokens.skip(self.number)
        skipped = int(skip.sum())
        self.skipper.stats.add(self.number, skip, skipped)
        if skipped == skip.numel():  # no norm and no weight of the FFN is read
            return h
        h_out = self._feed_forward(h, skip, skipped)
        tokens.watch(self.number, h, h_out, skip)
        return h_out

    def _feed_forward(self, h: Tensor, skip: Tensor, skipped: int) -> Tensor:
        """h' + FFN(norm2(h')) for the tokens that do not skip, which are taken together."""
        layer: Any = self.layer
        if not skipped:
            return h + layer.mlp(layer.post_attention_layernorm(h))
        states, running = h.flatten(0, 1), (~skip).flatten().nonzero()[:, 0]
        some = states.index_select(0, running)
        ran = some + layer.mlp(layer.post_attention_layernorm(some[None]))[0]
        return states.index_copy(0, running, ran).view_as(h)

    def _whole_layer(self, h: Tensor, skip: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attention is left out too. Tokens that skip have no entry here, and nobody reads one: whoever comes after skips as well."""
        skipped = int(skip.sum())
        self.skipper.stats.add(self.number, skip, skipped)
        return h if skipped == skip.numel() else torch.where(skip[..., None], h, self.plain(h, *args, **kwargs))


class Skipper:
    """What an enabled decoder carries: settings, counts, and the tokens of the pass that is going on (None: all of it runs in full)."""

    def __init__(self, decoder: nn.Module, config: FFNSkipConfig, per_token: bool) -> None:
        layers = layers_of(decoder)
        self.config, self.stats = config, FFNSkipStats(len(layers), ffn_flops(layers[0]), per_token)
        self.tokens: Tokens | None = None
        self.text_starts: Tensor | None = None  # int64 [B, 1] while a text is read: the column from which on tokens may skip
        self.layers = [SkippingLayer(layer, number, self) for number, layer in enumerate(layers)]
        for layer in self.layers:
            layer.attach()
        self.hook = decoder.register_forward_pre_hook(self.begin_pass, with_kwargs=True)

    def detach(self) -> None:
        self.hook.remove()
        for layer in self.layers:
            layer.detach()

    def begin_pass(self, decoder: nn.Module, args: Any, kwargs: Any) -> None:
        """Decide who may skip, before the first layer."""
        self.tokens = None
        if not self.config.skips:
            return
        if decoder.training:
            raise RuntimeError("the model is in train() and FFN skipping is enabled; expected eval(): call model.eval(), or disable it")
        given = inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments if args else kwargs
        ids, cache, mask = given.get("input_ids"), given.get("cache", given.get("past_key_values")), given.get("attention_mask")
        states = given.get("inputs_embeds") if ids is None else ids
        if states is None:
            return
        rows, columns = states.shape[:2]
        past = 0 if cache is None else int(cache.get_seq_length())
        real = torch.ones(rows, columns, dtype=torch.bool, device=states.device)
        if columns > 1 and isinstance(mask, Tensor) and mask.dim() == 2:
            real = mask[:, -columns:].to(states.device).bool()
        positions = _positions(mask, given.get("position_ids"), past, real)
        late = self._after_warm_up(cache, past, positions)
        if late is None:
            return
        may_skip = late & real
        after = int(may_skip.sum())
        self.stats.begin_pass((rows, columns), int(real.sum()), after)
        if after:
            self.tokens = Tokens(self.config, may_skip, torch.zeros_like(positions) if ids is None else ids, positions)

    def _after_warm_up(self, cache: Any, past: int, positions: Tensor) -> Tensor | None:
        """Which tokens are after the warm-up; None where they are given and run in full, as a prompt does."""
        config, columns = self.config, positions.shape[1]
        if self.text_starts is not None:
            return torch.arange(columns, device=positions.device) >= self.text_starts.to(positions.device)
        prompt = past == 0 or columns > 1  # several tokens at once are given, not decoded
        if cache is not None and (prompt or not hasattr(cache, PROMPT)):  # no mark: the pass before made it, or it is older than skipping
            if config.mode == "layers" and any(cache.get_seq_length(layer) < past for layer in config.static_layers):
                raise ValueError(
                    "the cache lacks entries of layers that were left out; expected a new one: begin with the whole text again"
                )
            setattr(cache, PROMPT, past + columns if prompt else past)
        if prompt and not config.skip_prefill:
            return None
        if config.warmup_counts == "position":
            return positions >= config.warmup_tokens
        return torch.full_like(positions, prompt or past - getattr(cache, PROMPT) >= config.warmup_tokens, dtype=torch.bool)


def _positions(mask: Any, given: Any, past: int, real: Bool[Tensor, "B T"]) -> Int64[Tensor, "B T"]:
    """The position of each token in its own text, padding left out."""
    if isinstance(given, Tensor) and given.dim() == 2:
        return given.to(real.device).expand(real.shape)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return (mask.to(real.device).long().cumsum(-1) - 1).clamp(min=0)[:, -real.shape[1] :]
    return torch.arange(past, past + real.shape[1], device=real.device).expand(real.shape)


def enable_ffn_skip(model: nn.Module, config: FFNSkipConfig, *, per_token: bool = False) -> Any:
    """Let a model skip while it decodes, until `disable_ffn_skip`. It is the same model, changed in place.

    Passes over several tokens (a prompt, drafted tokens to be verified, text without a cache) run in full, unless
    `config.skip_prefill`; so do the first `config.warmup_tokens` passes after a prompt.

    Args:
        model: a causal language model of transformers with pre-norm layers (Llama, Mistral, Qwen2 and 3, Gemma 1, OLMo 1, SmolLM3, ...),
            with any weights: any floating point dtype, quantised, with peft's adapters beside attention.
        config: as `calibrate` or the user made it.
        per_token: keep which blocks each token left out, in the stats' `per_token`.

    Returns:
        the model. What is counted stands in `stats_of(model)`, or comes from the context manager `ffn_skip`.

    Raises:
        ValueError: layers of another structure (their class is named), settings for another number of layers, or a model that is enabled.

    Examples:
        >>> from fewer.tasks import micro_lm
        >>> model = micro_lm()
        >>> model = enable_ffn_skip(model, FFNSkipConfig(1, 4, threshold=-1, warmup_tokens=0))
        >>> _ = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=5, min_new_tokens=5, do_sample=False)
        >>> disable_ffn_skip(model).per_layer  # the last of five tokens is never passed
        [0, 0, 4, 4]
    """
    decoder = decoder_of(model)
    if hasattr(decoder, SKIPPER):
        raise ValueError("FFN skipping is enabled on this model; expected one without: call disable_ffn_skip first")
    config.check_layers(len(decoder.layers))
    check_structure(decoder)
    setattr(decoder, SKIPPER, Skipper(decoder, config, per_token))
    return model


def stats_of(model: nn.Module) -> FFNSkipStats:
    """The counts of an enabled model."""
    return _skipper_of(model).stats


def disable_ffn_skip(model: nn.Module) -> FFNSkipStats:
    """The model as it was, every module and forward of it; what was counted is given back."""
    skipper = _skipper_of(model)
    skipper.detach()
    delattr(decoder_of(model), SKIPPER)
    return skipper.stats


def _skipper_of(model: nn.Module) -> Skipper:
    skipper = getattr(decoder_of(model), SKIPPER, None)
    if skipper is None:
        raise ValueError("FFN skipping is not enabled on this model; expected one that is: call enable_ffn_skip first")
    return skipper


@contextlib.contextmanager
def ffn_skip(model: nn.Module, config: FFNSkipConfig, *, per_token: bool = False) -> Iterator[FFNSkipStats]:
    """Skipping inside the block, with its counts; see `enable_ffn_skip`.

    Examples:
        >>> from fewer.tasks import micro_lm
        >>> model, config = micro_lm(), FFNSkipConfig(1, 3, threshold=-1, warmup_tokens=2)
        >>> with ffn_skip(model, config) as stats:
        ...     _ = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=7, min_new_tokens=7, do_sample=False)
        >>> stats.decoded_tokens, stats.tokens, stats.skipped_blocks, stats.ratio
        (6, 4, 4, 0.25)
    """
    enable_ffn_skip(model, config, per_token=per_token)
    try:
        yield stats_of(model)
    finally:
        disable_ffn_skip(model)


def teacher_forced(
    model: nn.Module,
    input_ids: Int64[Tensor, "B T"],
    config: FFNSkipConfig,
    warmup_positions: int | Int64[Tensor, "B"],
    *,
    attention_mask: Int64[Tensor, "B T"] | None = None,
    per_token: bool = False,
) -> tuple[Float[Tensor, "B T V"], FFNSkipStats]:
    """One pass over a text that gives what decoding it token by token would: whether a token skips follows from its own states alone.

    Args:
        model: not enabled; see `enable_ffn_skip`.
        input_ids: texts, int64.
        config: its warm-up is not looked at.
        warmup_positions: the column from which on tokens may skip: the prompt's length and the warm-up; one number, or one a row.
        attention_mask: 0 on padding, which stands on the left.
        per_token: see `enable_ffn_skip`.

    Returns:
        the logits of every position, and the counts; `decoded_tokens` are all of the text's.

    Raises:
        ValueError: `warmup_positions` is negative; and as `enable_ffn_skip`.
    """
    with reading(model, config, warmup_positions, per_token=per_token) as stats:
        return read(model, input_ids, attention_mask).logits, stats


@contextlib.contextmanager
def reading(model: nn.Module, config: FFNSkipConfig, starts: int | Tensor, *, per_token: bool = False) -> Iterator[FFNSkipStats]:
    """Passes inside the block read whole texts, tokens from a column on skipping as if they were decoded."""
    starts = torch.as_tensor(starts).reshape(-1, 1)
    if starts.is_floating_point() or bool((starts < 0).any()):
        raise ValueError(f"warmup_positions is {starts.flatten().tolist()}; expected whole numbers of at least 0")
    with ffn_skip(model, config, per_token=per_token) as stats:
        _skipper_of(model).text_starts = starts
        yield stats


@torch.no_grad()
def read(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
    """One pass over texts, without a cache."""
    words: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
    if attention_mask is not None:  # generate counts positions without the padding
        words |= {"attention_mask": attention_mask, "position_ids": (attention_mask.long().cumsum(-1) - 1).clamp(min=0)}
    return cast(Any, model)(**words)
