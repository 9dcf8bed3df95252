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

from fewer.language.ffn_skip.config import FFNSkipConfig
from fewer.language.ffn_skip.decoder import check_structure, decoder_of, ffn_flops, layers_of
from fewer.language.ffn_skip.stats import FFNSkipStats
from fewer.language.ffn_skip.tokens import Tokens

SKIPPER = "_ffn_skipper"  # the attribute of a decoder that is enabled
PROMPT = "_ffn_skip_prompt"  # the attribute of a cache: how many entries the prompt made


class SkippingLayer:
    """What a decoder layer's forward goes through while skipping is enabled."""

    def __init__(self, skipper: Skipper, number: int, layer: nn.Module) -> None:
        self.skipper, self.number, self.layer = skipper, number, layer
        # accelerate keeps the layer's own forward under another name, and moves its arguments to the layer's device before
        name = "_old_forward" if hasattr(layer, "_hf_hook") else "forward"
        kept = vars(layer).get(name)
        if kept is not None and getattr(kept, "__func__", None) is not type(layer).forward:
            raise ValueError(
                f"layer {number} ({type(layer).__name__}) has a forward that is not its class's; expected it as transformers made it: undo that first"
            )
        self.name, self.had_own = name, kept is not None
        setattr(layer, name, self.forward)

    def detach(self) -> None:
        delattr(self.layer, self.name)
        if self.had_own:
            setattr(self.layer, self.name, self.plain)

    @property
    def plain(self) -> Any:
        """The layer's own forward."""
        return type(self.layer).forward.__get__(self.layer)

    def forward(self, hidden_states: Float[Tensor, "B T H"], *args: Any, **kwargs: Any) -> Float[Tensor, "B T H"]:
        """h' = h + Attn(norm1(h)); h_out = h' + FFN(norm2(h')) for tokens that do not skip, h' for those that do."""
        tokens = self.skipper.tokens
        if tokens is None or not tokens.config.cold_start <= self.number < tokens.config.cold_end:
            return self.plain(hidden_states, *args, **kwargs)
        skip = tokens.skip(self.number)
        if tokens.config.mode == "layers":
            return self._whole_layer(hidden_states, skip, *args, **kwargs)
        layer: Any = self.layer
        kwargs |= self._named(args)
        attended, *_ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
        h = hidden_states + attended
        h_out = self._feed_forward(h, skip)
        if h_out is not h:
            tokens.watch(self.number, h, h_out, ~skip)
        self.skipper.stats.add(self.number, skip, h_out is h)
        return h_out

    def _named(self, args: tuple[Any, ...]) -> dict[str, Any]:
        """Arguments after the states by their names: attention has them in another order."""
        return dict(zip(list(inspect.signature(self.plain).parameters)[1:], args, strict=False)) if args else {}

    def _feed_forward(self, h: Tensor, skip: Tensor) -> Tensor:
        """The FFN and the sum for the tokens that do not skip, which are taken together; h itself where all do: no norm, no weight is read."""
        layer: Any = self.layer
        running = (~skip).flatten().nonzero()[:, 0]
        if len(running) == 0:
            return h
        if len(running) == skip.numel():
            return h + layer.mlp(layer.post_attention_layernorm(h))
        states = h.flatten(0, 1)
        some = states.index_select(0, running)
        ran = some + layer.mlp(layer.post_attention_layernorm(some[None]))[0]
        return states.index_copy(0, running, ran).view_as(h)

    def _whole_layer(self, h: Tensor, skip: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attention is left out too. Tokens that skip have no entry here, and nobody reads one: whoever comes after skips as well."""
        untouched = bool(skip.all())
        self.skipper.stats.add(self.number, skip, untouched)
        return h if untouched else torch.where(skip[..., None], h, self.plain(h, *args, **kwargs))


class Skipper:
    """What an enabled decoder carries: settings, counts, and the tokens of the pass that is going on (None: all of it runs in full)."""

    def __init__(self, decoder: nn.Module, config: FFNSkipConfig, per_token: bool) -> None:
        layers = layers_of(decoder)
        self.config, self.stats = config, FFNSkipStats(len(layers), ffn_flops(layers[0]), per_token)
        self.tokens: Tokens | None = None
        self.text_starts: Tensor | None = None  # int64 [B, 1] while a text is read: the column from which on tokens may skip
        self.layers: list[SkippingLayer] = []
        try:
            for number, layer in enumerate(layers):
                self.layers.append(SkippingLayer(self, number, layer))
        except ValueError:
            self.detach_layers()
            raise
        self.hook = decoder.register_forward_pre_hook(self.begin_pass, with_kwargs=True)

    def detach_layers(self) -> None:
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
        ids, embedded = given.get("input_ids"), given.get("inputs_embeds")
        if ids is None and embedded is None:
            return
        rows, columns = (ids if ids is not None else embedded).shape[:2]
        cache = given.get("cache", given.get("past_key_values"))
        past = 0 if cache is None else int(cache.get_seq_length())
        device = (ids if ids is not None else embedded).device
        real, positions = _places(given.get("attention_mask"), given.get("position_ids"), rows, columns, past, device)
        decoding, may_skip = self._after_warm_up(cache, past, positions)
        if not decoding:
            return
        may_skip = None if may_skip is None else may_skip & real
        if may_skip is not None and not may_skip.any():
            may_skip = None
        self.stats.begin_pass(real, may_skip)
        if may_skip is not None:
            self.tokens = Tokens(self.config, may_skip, torch.zeros_like(positions) if ids is None else ids, positions)

    def _after_warm_up(self, cache: Any, past: int, positions: Tensor) -> tuple[bool, Tensor | None]:
        """(whether these tokens are decoded, which of them are after the warm-up, None where none is)."""
        config, everybody = self.config, torch.ones_like(positions, dtype=torch.bool)
        if self.text_starts is not None:
            return True, torch.arange(positions.shape[1], device=positions.device) >= self.text_starts.to(positions.device)
        late = positions >= config.warmup_tokens
        prompt = past == 0 or positions.shape[1] > 1  # several tokens at once are given, not decoded
        if prompt:
            if cache is not None:
                self._refuse_missing_entries(cache, past)
                setattr(cache, PROMPT, past + positions.shape[1])
            return config.skip_prefill, everybody if config.warmup_counts == "generated" else late
        if config.warmup_counts == "position":
            return True, late
        if not hasattr(cache, PROMPT):  # the model made it for itself in the pass before, or it is older than skipping
            self._refuse_missing_entries(cache, past)
            setattr(cache, PROMPT, past)
        return True, everybody if past - getattr(cache, PROMPT) >= config.warmup_tokens else None

    def _refuse_missing_entries(self, cache: Any, past: int) -> None:
        if self.config.mode == "layers" and any(cache.get_seq_length(layer) < past for layer in self.config.static_layers):
            raise ValueError("the cache lacks entries of layers that were left out; expected a new one: begin again with the whole text")


def _places(mask: Any, given: Any, rows: int, columns: int, past: int, device: Any) -> tuple[Bool[Tensor, "B T"], Int64[Tensor, "B T"]]:
    """(which tokens are no padding, the position of each in its own text)."""
    flat = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
    real = torch.ones(rows, columns, dtype=torch.bool, device=device) if flat is None else flat[:, -columns:].to(device).bool()
    if isinstance(given, Tensor) and given.dim() == 2:
        return real, given.to(device).expand(rows, columns)
    if flat is not None:
        return real, (flat.to(device).long().cumsum(-1) - 1).clamp(min=0)[:, -columns:]
    return real, torch.arange(past, past + columns, device=device).expand(rows, columns)


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
    skipper.detach_layers()
    skipper.hook.remove()
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
