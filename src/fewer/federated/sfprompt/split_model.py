"""A frozen encoder cut in three, tail(body(head(x, p))): what a client holds of it, and the cut of a ViT.

Tokens are [B, T, D], the class token first, then the P tokens of the soft prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.checks import check_choice, check_whole
from fewer.federated.sfprompt.wire import BodyServer, check_frozen, insert_prompt

if TYPE_CHECKING:
    from transformers import ViTForImageClassification

At = Literal["input", "cut"]
START = 0.1  # the prompt begins as uniform(-0.1, 0.1)


class ClientModel(nn.Module):
    """What a client holds: head, tail and prompt. Called, it is the shortcut tail(head(x, p)). Made by `SplitModel.client`.

    Attributes:
        prompt: p [P, D]; None where there is none.
        at: where the prompt goes in: "input", before the head's first block, or "cut", after the head.
        tokens: tokens of an example at the cut without the prompt's; None: not known.
        width: D.
        class_token_only: the tail reads the class token alone, so that body's output and its gradient travel as that.
        whole_size: parameters of the whole model that was cut, without the prompt.
    """

    def __init__(
        self,
        head: nn.Module,
        tail: nn.Module,
        prompt: nn.Parameter | None,
        at: At,
        *,
        width: int,
        tokens: int | None,
        class_token_only: bool,
        whole_size: int,
    ) -> None:
        super().__init__()
        self.prompt: nn.Parameter | None
        self.register_parameter("prompt", prompt)
        self.head, self.tail = head, tail
        self.at: At = at
        self.width, self.tokens, self.class_token_only, self.whole_size = width, tokens, class_token_only, whole_size
        self.train(self.training)

    def train(self, mode: bool = True) -> ClientModel:
        """As every module's, but what is frozen stays in evaluation mode."""
        super().train(mode)
        self.head.eval()
        return self

    @property
    def prompt_tokens(self) -> int:
        return 0 if self.prompt is None else len(self.prompt)

    @property
    def trained_names(self) -> list[str]:
        """The names of what is trained: the prompt and all of the tail."""
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    def smashed(self, x: Tensor) -> Float[Tensor, "B T D"]:
        """The head's output, which goes over the wire; at "cut" it does not depend on the prompt."""
        if self.at == "cut":
            return self.head(x)
        return self.head(x, None if self.prompt is None else self.prompt.clone())  # a copy, as FlopCounterMode cannot follow a leaf

    def prompted(self, smashed: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """The head's output as the body reads it."""
        return insert_prompt(smashed, self.prompt) if self.at == "cut" else smashed

    def shortcut(self, x: Tensor) -> Float[Tensor, "B C"]:
        """tail(head(x, p)): logits without the body."""
        return self.tail(self.prompted(self.smashed(x)))

    def forward(self, x: Tensor) -> Float[Tensor, "B C"]:
        return self.shortcut(x)


class SplitModel(ClientModel):
    """The whole, cut in three; called, it is tail(body(head(x, p))).

    Args:
        head: frozen; `head(x, prompt)` -> tokens [B, T, D] at "input" (see `insert_prompt`), `head(x)` at "cut".
        body: frozen; tokens -> tokens. It lies with the server alone.
        tail: trained; tokens -> logits [B, classes].
        prompt_tokens: P; 0: no prompt, so that no gradient travels.
        at: "input": the prompt goes through the head; "cut": it is put in after the head, whose output then never changes.
        width: D; that of the body's first LayerNorm by default.
        tokens: of an example at the cut without the prompt's; needed for costs alone.
        class_token_only: the tail reads the class token alone; only at "cut".

    Raises:
        ValueError: head or body has parameters that are trained, or BatchNorm in training mode; head or tail drops out; a number is out
            of its range.

    Examples:
        >>> head, body, tail = nn.Linear(3, 8).requires_grad_(False), nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 2)
        >>> model = SplitModel(head, body, tail, prompt_tokens=2, at="cut", width=8)
        >>> model(torch.zeros(4, 5, 3)).shape, model.trained_names
        (torch.Size([4, 7, 2]), ['prompt', 'tail.weight', 'tail.bias'])
    """

    def __init__(
        self,
        head: nn.Module,
        body: nn.Module,
        tail: nn.Module,
        prompt_tokens: int = 4,
        at: At = "input",
        width: int | None = None,
        *,
        tokens: int | None = None,
        class_token_only: bool = False,
    ) -> None:
        check_whole(least=0, prompt_tokens=prompt_tokens)
        check_choice(get_args(At), at=at)
        check_whole(optional=["width", "tokens"], width=width, tokens=tokens)
        for name, part in (("head", head), ("body", body)):
            check_frozen(name, part)
        for name, part in (("head", head), ("tail", tail)):
            check_no_dropout(name, part)
        if not any(parameter.requires_grad for parameter in tail.parameters()):
            raise ValueError("the tail has no parameter that is trained; expected some: tail.requires_grad_()")
        if class_token_only and at != "cut":
            raise ValueError(f"class_token_only with at={at!r}; expected at='cut'")
        width = width if width is not None else _width_of(body)
        like = next(parameter for parameter in tail.parameters() if parameter.requires_grad)
        prompt = nn.Parameter(like.new_empty(prompt_tokens, width).uniform_(-START, START)) if prompt_tokens else None
        size = sum(parameter.numel() for part in (head, body, tail) for parameter in part.parameters())
        super().__init__(head, tail, prompt, at, width=width, tokens=tokens, class_token_only=class_token_only, whole_size=size)
        self.body = body.eval()

    def train(self, mode: bool = True) -> SplitModel:
        super().train(mode)
        if "body" in self._modules:
            self.body.eval()
        return self

    def forward(self, x: Tensor) -> Float[Tensor, "B C"]:
        return self.tail(self.body(self.prompted(self.smashed(x))))

    def client(self) -> ClientModel:
        """What a client holds; its tensors are those of the whole."""
        return ClientModel(
            self.head, self.tail, self.prompt, self.at,
            width=self.width, tokens=self.tokens, class_token_only=self.class_token_only, whole_size=self.whole_size,
        ).train(self.training)  # fmt: skip

    def server(self, timeout: float = 3600.0) -> BodyServer:
        """What the server holds: the body (see `BodyServer`)."""
        if self.tokens is None:
            return BodyServer(self.body, self.class_token_only, timeout=timeout)
        tokens = self.tokens + self.prompt_tokens
        return BodyServer(self.body, self.class_token_only, shape=self.cut_shape, tokens=tokens, timeout=timeout)

    @property
    def cut_shape(self) -> tuple[int, int]:
        """(tokens, width) of an example's activations as the client sends them."""
        if self.tokens is None:
            raise ValueError("the model does not say how many tokens an example has; expected SplitModel(..., tokens=...)")
        return self.tokens + (self.prompt_tokens if self.at == "input" else 0), self.width

    def merged(self) -> nn.Module:
        """A copy of the whole model with the prompt built in."""
        return copy.deepcopy(self).eval()


# A vision transformer


class Blocks(nn.Module):
    """Encoder blocks, one after the other."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens


class ViTHead(Blocks):
    """Embeddings and the first blocks; the prompt's tokens get no position."""

    def __init__(self, embeddings: nn.Module, layers: Iterable[nn.Module]) -> None:
        super().__init__(layers)
        self.embeddings = embeddings

    def forward(self, x: Float[Tensor, "B c h w"], prompt: Tensor | None = None) -> Float[Tensor, "B T D"]:
        dtype = next(self.embeddings.parameters()).dtype
        return super().forward(insert_prompt(self.embeddings(x.to(dtype)), prompt))


class ViTTail(Blocks):
    """The last blocks, the final norm, and the classifier on the class token; the very last block computes that token's output alone."""

    def __init__(self, layers: Iterable[nn.Module], norm: nn.Module, classifier: nn.Module) -> None:
        super().__init__(layers)
        self.norm, self.classifier = norm, classifier

    def forward(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "B C"]:
        for place, layer in enumerate(self.layers, 1):
            tokens = class_token_after(layer, tokens) if place == len(self.layers) else layer(tokens)
        return self.classifier(self.norm(tokens[:, 0]))


def class_token_after(layer: Any, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "B 1 D"]:
    """A block's output for the class token: it looks at all tokens, but nobody reads what becomes of the others."""
    attention = getattr(layer, "attention", None)
    if attention is None or not hasattr(attention, "q_proj"):  # a block that is built otherwise
        return layer(tokens)[:, :1]
    normed, heads = layer.layernorm_before(tokens), (len(tokens), -1, attention.num_attention_heads, attention.head_dim)
    q, k, v = (
        project(part).view(heads).transpose(1, 2)
        for project, part in ((attention.q_proj, normed[:, :1]), (attention.k_proj, normed), (attention.v_proj, normed))
    )
    mixed = F.scaled_dot_product_attention(q, k, v, scale=attention.scaling)
    token = tokens[:, :1] + attention.o_proj(mixed.transpose(1, 2).flatten(2))
    return token + layer.mlp(layer.layernorm_after(token))


def prompt_after(module: nn.Module, inputs: Any, tokens: Tensor) -> Tensor:
    """A forward hook: the module's prompt is put into what it gives."""
    return insert_prompt(tokens, module.prompt)  # pyright: ignore[reportArgumentType] - a parameter


def prompt_before(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A forward hook: the module's prompt is put into what it reads."""
    return insert_prompt(inputs[0], module.prompt), *inputs[1:]  # pyright: ignore[reportArgumentType] - a parameter


class SplitViT(SplitModel):
    """A `ViTForImageClassification` cut in three. Made by `split_vit`."""

    def __init__(self, model: Any, head_blocks: int, tail_blocks: int, prompt_tokens: int, at: At) -> None:
        vit, layers = model.vit, list(model.vit.layers)
        last = len(layers) - tail_blocks
        super().__init__(
            ViTHead(vit.embeddings, layers[:head_blocks]).requires_grad_(False),
            Blocks(layers[head_blocks:last]).requires_grad_(False),
            ViTTail(layers[last:], vit.layernorm, model.classifier).requires_grad_(),
            prompt_tokens, at, model.config.hidden_size,
            tokens=1 + vit.embeddings.patch_embeddings.num_patches, class_token_only=at == "cut" and tail_blocks == 0,
        )  # fmt: skip
        self.config = model.config

    def merged(self) -> ViTForImageClassification:
        """The whole as a `ViTForImageClassification` in evaluation mode, the prompt built in; a copy.

        The prompt is a parameter beside the others, which keep their names. Keep the model by its `state_dict`, which another `merged()`
        loads: transformers' `from_pretrained` does not know the prompt, and would leave it out.
        """
        from transformers import ViTForImageClassification

        own: Any = copy.deepcopy(self)
        with torch.device("meta"):
            model: Any = ViTForImageClassification(own.config)
        model.vit.embeddings, model.vit.layernorm, model.classifier = own.head.embeddings, own.tail.norm, own.tail.classifier
        model.vit.layers = nn.ModuleList([*own.head.layers, *own.body.layers, *own.tail.layers])
        if own.prompt is not None:
            place = model.vit.embeddings if self.at == "input" else own.body.layers[0]
            place.register_parameter("prompt", own.prompt)
            place.register_forward_hook(prompt_after) if self.at == "input" else place.register_forward_pre_hook(prompt_before)
        return model.requires_grad_().eval()


def split_vit(
    model: ViTForImageClassification, head_blocks: int = 1, tail_blocks: int = 1, prompt_tokens: int = 4, at: At = "input"
) -> SplitViT:
    """Cut a copy of a vision transformer of L blocks in three.

    Args:
        model: transformers' image classifier; it stays as it is.
        head_blocks: the head is the embeddings and so many first blocks.
        tail_blocks: the tail is so many last blocks, the final norm and the classifier on the class token.
        prompt_tokens: P.
        at: "input": the prompt goes in before the first block; "cut": after the head.

    Raises:
        ValueError: no block is left for the body, or the shortcut would never see the image (no block in head and tail).

    Examples:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> config = ViTConfig(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4)
        >>> split = split_vit(ViTForImageClassification(config), prompt_tokens=2)
        >>> split.cut_shape, split(torch.zeros(1, 3, 8, 8)).shape
        ((7, 8), torch.Size([1, 2]))
    """
    check_whole(least=0, head_blocks=head_blocks, tail_blocks=tail_blocks)
    if not hasattr(getattr(model, "vit", None), "layers"):
        raise ValueError(
            f"the model is a {type(model).__name__}; expected transformers' ViTForImageClassification, whose blocks are vit.layers"
        )
    blocks = len(model.vit.layers)
    if head_blocks + tail_blocks >= blocks:
        raise ValueError(
            f"head_blocks is {head_blocks} and tail_blocks {tail_blocks} of {blocks} blocks; expected fewer together, so that a body is left"
        )
    if head_blocks == 0 and tail_blocks == 0:
        raise ValueError(
            "head_blocks and tail_blocks are 0: the class token is the same for every image, so the shortcut would never see one; expected "
            "a block in one of them: head_blocks=1"
        )
    return SplitViT(copy.deepcopy(model), head_blocks, tail_blocks, prompt_tokens, at)


# What is refused


def check_no_dropout(name: str, part: nn.Module) -> None:
    """ValueError naming a layer that drops out: the two passes over the wire would not be of the same function."""
    for path, module in part.named_modules():
        names = ["p"] if isinstance(module, nn.modules.dropout._DropoutNd) else ["attention_dropout", "dropout", "drop_prob"]
        for share in (getattr(module, each, 0) for each in names):
            if isinstance(share, float | int) and share > 0:
                raise ValueError(
                    f"layer {path!r} of the {name} drops out with probability {share}; expected none in head and tail: set it to 0"
                )


def _width_of(body: nn.Module) -> int:
    for module in body.modules():
        if isinstance(module, nn.LayerNorm):
            return module.normalized_shape[-1]
    raise ValueError("the body has no LayerNorm that tells its width; expected SplitModel(..., width=D)")
