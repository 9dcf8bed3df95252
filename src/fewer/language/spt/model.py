"""A language model with LoRA, routed feed-forward networks and sparse attention, wrapped as peft wraps one.

Converted in the release's order: LoRA on all linear and embedding layers (peft's), then feed-forward networks, then attention, which is an
attention implementation of transformers named "spt" with a mask of its own name (without one padding would be lost silently).
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.activations import ACT2FN
from transformers.masking_utils import AttentionMaskInterface

from fewer.errors import require
from fewer.files import made_whole, model_digest, read_json, read_weights
from fewer.fitting import evaluating, fit_steps
from fewer.language._shared.structure import structure_of
from fewer.language.spt.attention import SparseAttention, SPTConfig, keep_codes
from fewer.language.spt.quantizer import ProductQuantizer, recall_and_mass
from fewer.language.spt.routed import RoutedFFN, RoutedGatedFFN

CONFIG, WEIGHTS = "spt_config.json", "adapter.safetensors"
INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
EPOCH = 256  # batches, after which the learning rate falls to 0.9 of itself


def spt_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **words: Any
) -> tuple[Tensor, None]:
    """The attention implementation "spt" of transformers: [B, H, n, d] -> [B, n, H, d]; attention weights have no dropout."""
    own = getattr(module, "spt", None)
    if own is None or not getattr(module, "is_causal", True):
        raise NotImplementedError(
            f"{type(module).__name__} is no causal self-attention with a code book; expected a model that get_spt_model made: use another attn_implementation"
        )
    new = key[:, :, -query.shape[2] :]  # a cache's keys were new once
    if not (query.isfinite().all() and new.isfinite().all()):
        raise ValueError(
            f"queries or keys of layer {getattr(module, 'layer_idx', '?')} are not finite; expected numbers: look at the input, or lower the learning rate"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return own(query, key, value, attention_mask, scale, words.get("sliding_window")).transpose(1, 2).contiguous(), None


def spt_mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **_: Any,
) -> Tensor | None:
    """The mask that "spt" gets: which keys are no padding, [B, t]; which are in the past it knows itself.

    Raises:
        NotImplementedError: a mask that is more than causal (sequences packed into one row, blocks), a cache of fixed length.
    """
    if int(q_offset) + q_length != kv_offset + kv_length:
        raise NotImplementedError(
            f"a cache of fixed length gives sparse attention {kv_length} keys for {q_length} queries from {int(q_offset)} on; expected one "
            "that grows: use transformers' DynamicCache"
        )
    if not allow_is_causal_skip:
        raise NotImplementedError(
            "this mask is more than causal (position_ids that begin anew within a row, for one); expected a sequence a row: use padding "
            "and an attention_mask"
        )
    return None if attention_mask is None else attention_mask[:, kv_offset : kv_offset + kv_length].bool()


AttentionInterface.register("spt", spt_attention)
AttentionMaskInterface.register("spt", spt_mask)  # pyright: ignore[reportArgumentType]


class LayerStats(NamedTuple):
    """What a layer did in a pass: shares of tokens a block saw; how many of the true top keys were kept, and how much of the attention."""

    load: list[float]
    recall: float
    mass: float
    stored_bytes: int


def get_spt_model(model: nn.Module, config: SPTConfig | None = None) -> SPTModel:
    """Put LoRA on a model, route its feed-forward networks and make its attention sparse; only adapters, routers and code books train.

    Args:
        model: a Llama, Mistral, Qwen2 or OPT causal language model of transformers; it is changed in place.

    Raises:
        ValueError: an architecture that is not known, quantised weights, or sizes that do not divide.

    Examples:
        >>> from fewer.tasks import micro_lm
        >>> model = get_spt_model(micro_lm(), SPTConfig(lora_r=4))
        >>> ids = torch.arange(24)[None]
        >>> model(input_ids=ids, labels=ids).loss.backward()
        >>> model.generate(input_ids=ids, max_new_tokens=2).shape
        torch.Size([1, 26])
    """
    return SPTModel(model, config or SPTConfig())


class SPTModel(nn.Module):
    """What `get_spt_model` makes. What this class lacks (`generate`, ...) is asked of the model; in training a loss has `auxiliary_loss()` in it."""

    def __init__(self, model: nn.Module, config: SPTConfig) -> None:
        super().__init__()
        self.structure = check_convertible(model, config)
        self.spt_config, self.base_hash = config, model_digest(model)
        model.requires_grad_(False)
        self.base_model = with_lora(model, config.lora_r) if config.lora_r else model
        self._last: dict[str, Any] = {}
        if config.routed_ffn:
            self._route()
        if config.sparse_attention:
            for layer in self.structure.layers:
                attention: Any = model.get_submodule(self.structure.path(layer, "self_attn"))
                attention.spt = SparseAttention(self.structure.head_dim, config).to(_place(model))
                attention.register_forward_pre_hook(keep_codes, with_kwargs=True)
            cast(Any, model).set_attn_implementation("spt")

    def _route(self) -> None:
        config, family, plain = self.spt_config, self.structure.family, cast(Any, self.plain)
        words: dict[str, Any] = {"blocks": config.ffn_blocks, "active": config.ffn_active, "balance_weight": config.balance_weight}
        for number in self.structure.layers:
            layer = plain.get_submodule(f"{family.layers}.{number}")
            if family.name == "opt":
                routed: Any = RoutedFFN(layer.fc1, layer.fc2, act=layer.activation_fn, **words)
                layer.fc1, layer.activation_fn, layer.fc2 = routed, nn.Identity(), nn.Identity()
                layer.dropout = 0.0  # the dense network's; transformers keeps one rate for it and for attention's output
            else:
                act = ACT2FN[plain.config.hidden_act]
                routed = layer.mlp = RoutedGatedFFN(layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj, act=act, **words)
            routed.router.to(_place(plain))

    @property
    def plain(self) -> nn.Module:
        """The model of transformers itself, converted."""
        return cast(Any, self.base_model).base_model.model if self.spt_config.lora_r else self.base_model

    @property
    def attentions(self) -> list[SparseAttention]:
        return [module for module in self.modules() if isinstance(module, SparseAttention)]

    @property
    def networks(self) -> list[RoutedFFN | RoutedGatedFFN]:
        return [module for module in self.modules() if isinstance(module, RoutedFFN | RoutedGatedFFN)]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)

    def forward(self, *args: Any, **words: Any) -> Any:
        given = dict(zip(("input_ids", "attention_mask"), args, strict=False)) | words
        self._last = {name: value for name, value in given.items() if name in INPUTS and value is not None}
        out = self.base_model(*args, **words)
        if self.training and getattr(out, "loss", None) is not None:
            out.loss = out.loss + self.auxiliary_loss()
        return out

    def auxiliary_loss(self) -> Tensor:
        """pq_weight times the code books' losses, plus the routers' balance, of the last pass in training mode."""
        books = [self.spt_config.pq_weight * each.loss for each in self.attentions if each.loss is not None]
        routers = [each.balance_loss for each in self.networks if each.balance_loss is not None]
        return sum(books + routers, torch.zeros((), device=_place(self)))

    @torch.no_grad()
    def stats(self, **inputs: Any) -> list[LayerStats]:
        """Block loads, recall of the true top keys, kept attention mass and stored bytes of each layer, for an input or the last pass'."""
        if not (inputs := inputs or self._last):
            raise ValueError("no pass went before; expected one, whose input is looked at, or an input: stats(input_ids=...)")
        seen = self._watched(**inputs)
        found = []
        for number in self.structure.layers:
            load = cast(Tensor, self.networks[number].load).tolist() if self.networks else []
            recall, mass = recall_and_mass(*seen[number]) if seen else (1.0, 1.0)
            found.append(LayerStats(load, recall, mass, self.attentions[number].stored_bytes if seen else 0))
        return found

    @torch.no_grad()
    def _watched(self, **words: Any) -> list[tuple[Any, ...]]:
        """(q, k, csr, mask, window) of each sparse attention in a pass in eval mode."""
        for each in self.attentions:
            each.watched = []
        try:
            with evaluating(self):
                self.base_model(**words, use_cache=False)
            return [cast(Any, each.watched)[0] for each in self.attentions]
        finally:
            for each in self.attentions:
                each.watched = None

    def train_code_books(self, ids: Tensor, steps: int = 200, lr: float = 3e-2, vectors: int = 512) -> None:
        """Train the code books alone on the queries and keys of some windows [B, T]: random ones hardly move in a short tuning.

        Args:
            vectors: of queries, and of keys, that are drawn for a step.
        """
        for each, (q, k, *_) in zip(self.attentions, self._watched(input_ids=ids), strict=True):
            rows = [z.reshape(-1, z.shape[-1]) for z in (q, k)]
            drawn = ([z[torch.randint(len(z), (vectors,), device=z.device)] for z in rows] for _ in range(steps))
            loss_of = lambda z, quantizer=each.quantizer: quantizer.loss(z[0]) + quantizer.loss(z[1])  # noqa: E731
            fit_steps(torch.optim.Adam(each.quantizer.parameters(), lr=lr), loss_of, drawn, steps)

    def fine_tune(
        self, windows: Iterable[Tensor], steps: int, lr: float = 1e-4, tell: Callable[[int, float], None] | None = None
    ) -> list[float]:
        """Train on windows [B, T] of tokens by the release's recipe: AdamW, weight decay 0.1, clip 1, the rate x 0.9 every 256 steps.

        Returns:
            the loss of each step, `auxiliary_loss` included; the model is in eval mode then.
        """
        optimizer = torch.optim.AdamW([each for _, each in self.trained()], lr=lr, weight_decay=0.1)
        loss_of = lambda ids: self(input_ids=ids, labels=ids, use_cache=False).loss  # noqa: E731
        self.train()
        try:
            return fit_steps(optimizer, loss_of, windows, steps, schedule=lambda step: 0.9 ** (step // EPOCH), clip=1.0, tell=tell)
        finally:
            self.eval()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_last": {}}

    # Kept on disk

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that train, by name."""
        return ((name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad)

    def print_trainable_parameters(self) -> None:
        """In peft's words."""
        trained, whole = (sum(p.numel() for _, p in each) for each in (self.trained(), self.named_parameters()))
        print(f"trainable params: {trained:,} || all params: {whole:,} || trainable%: {100 * trained / whole:.4f}")

    def save_pretrained(self, out_dir: str | Path, *, overwrite: bool = False) -> Path:
        """Write what trains, and its config: the adapter alone, whole or not at all."""
        from safetensors.torch import save_file

        with made_whole(out_dir, overwrite, option="out_dir") as part:
            save_file({name: parameter.detach().cpu().contiguous() for name, parameter in self.trained()}, part / WEIGHTS)
            words = dataclasses.asdict(self.spt_config) | {"base_hash": self.base_hash}
            (part / CONFIG).write_text(json.dumps(words, indent=1), encoding="utf8")
        return Path(out_dir)

    @classmethod
    def from_pretrained(cls, model: nn.Module, adapter_dir: str | Path) -> SPTModel:
        """The model that an adapter was saved of, converted and with the adapter's weights.

        Raises:
            ValueError: the adapter is of another base model, or its files do not hold together.
        """
        folder = Path(adapter_dir)
        words = read_json(folder / CONFIG)
        expected = words.pop("base_hash", None)
        try:
            config = SPTConfig(**words)
        except TypeError as error:
            raise ValueError(f"{folder / CONFIG} is no config of SPT ({error}); expected what save_pretrained wrote") from error
        if expected != model_digest(model):
            raise ValueError(f"{folder} is an adapter of another base model; expected the model that it was trained on")
        made, weights = cls(model, config), read_weights(folder / WEIGHTS)
        own = dict(made.trained())
        odd = sorted(set(own) ^ set(weights)) + [name for name in own if name in weights and own[name].shape != weights[name].shape]
        if odd:
            raise ValueError(f"{folder / WEIGHTS} and its config disagree about {', '.join(odd[:5])}; expected the files of one adapter")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(weights[name])
        return made.eval()

    def merge_and_unload(self) -> None:
        """There is no dense model that computes this: RuntimeError that says so."""
        raise RuntimeError(
            "a routed network and sparse attention are other functions than dense ones, so there is no dense model to merge into; keep the "
            "adapter: save_pretrained"
        )


def check_convertible(model: nn.Module, config: SPTConfig) -> Any:
    """The model's structure; ValueError where it cannot be converted."""
    structure = structure_of(model, ["gated", "opt"])
    kind = cast(Any, model).config.model_type
    if kind not in ("llama", "mistral", "qwen2", "opt"):
        raise ValueError(
            f"{type(model).__name__} ({kind}) is of no known architecture; expected a Llama, Mistral, Qwen2 or OPT causal language model"
        )
    for layer in structure.layers:
        for name in structure.family.members:
            linear = model.get_submodule(structure.path(layer, name))
            if type(linear) is not nn.Linear or not linear.weight.is_floating_point():
                raise ValueError(
                    f"{structure.path(layer, name)} is a {type(linear).__name__}; expected an unquantised torch.nn.Linear: load the model without quantisation"
                )
    odd = [width for width in structure.widths if config.routed_ffn and width % config.ffn_blocks]
    if odd:
        raise ValueError(
            f"a feed-forward network has {odd[0]} channels and ffn_blocks is {config.ffn_blocks}; expected a divisor of {odd[0]}"
        )
    if config.sparse_attention:
        with torch.device("meta"):
            ProductQuantizer(structure.head_dim, config.codeword_dim)  # says what does not divide
    return structure


def with_lora(model: nn.Module, rank: int) -> Any:
    """The model with peft's LoRA on all linear and embedding layers: A ~ N(0, 1), B = 0, no scaling factor."""
    peft = require("peft", "language")
    paths = [name for name, module in model.named_modules() if type(module) in (nn.Linear, nn.Embedding)]
    config = peft.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=paths)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".*tie_word_embeddings.*"
        )  # peft warns that adapters of tied layers merge badly: these never merge
        wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_A" in name:  # of an embedding peft draws B so and begins with A at 0: it looks A up and multiplies by B
                parameter.normal_()
    return wrapped


def _place(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
