"""Cross-attention maps of one stage, kept and used again in the next: where in the image each word belongs is known before the image grows."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fewer.checks import check_choice, check_share
from fewer.diffusion._shared.prediction import at_least_single

Grid = tuple[int, int]


def resize_map(probabilities: Float[Tensor, "B hw tokens"], grid: Grid, to: Grid, how: str = "2d") -> Float[Tensor, "B HW tokens"]:
    """A map of queries on `grid` for queries on another, bilinear; rows keep their sum.

    "2d" resizes over rows and columns. "released" takes the flattened matrix for an image, which mixes the ends of the grid's rows.
    """
    if grid == to:
        return probabilities
    wide = probabilities.to(at_least_single(probabilities.dtype))
    if how == "released":
        size = (to[0] * to[1], wide.shape[2])
        return F.interpolate(wide[:, None], size=size, mode="bilinear", align_corners=False)[:, 0].to(probabilities.dtype)
    image = wide.mT.unflatten(-1, grid)
    return F.interpolate(image, size=to, mode="bilinear", align_corners=False).flatten(2).mT.to(probabilities.dtype)


def query_grid(queries: int, image: Grid) -> Grid:
    """(h, w) of so many queries in a network that halves its image, rounding up."""
    h, w = image
    while h * w > queries:
        h, w = math.ceil(h / 2), math.ceil(w / 2)
    if h * w != queries:
        raise ValueError(f"{queries} queries are no halving of an image of {image[0]} x {image[1]}; expected map_weight=0 for this network")
    return h, w


class MapStore:
    """The maps that the last call of a stage leaves to the next stage.

    Rows of a batch stay apart, and so do the guided and the unguided half.

    Args:
        weight: w_c, the share of the stored map in a later stage's attention.
        resize: as `resize_map` takes it.

    Attributes:
        collecting, mixing: whether the present call leaves maps, and uses those of the former stage.
        image: height and width of what the network is given.
        map: [B, h w, tokens] on `grid`, rows of sum 1; None before the first stage has ended.
    """

    def __init__(self, weight: float, resize: str = "2d") -> None:
        check_share(weight=weight)
        check_choice(("2d", "released"), resize=resize)
        self.weight, self.resize = weight, resize
        self.clear()

    def clear(self) -> None:
        """Forget all maps."""
        self.collecting = self.mixing = False
        self.image: Grid = (0, 0)
        self.map: Tensor | None = None
        self.grid: Grid = (0, 0)
        self.first_grid: Grid = (0, 0)  # of the first stage's largest map
        self._seen: dict[Grid, list[Tensor]] = {}
        self._resized: dict[Grid, Tensor] = {}

    def turn(self, image: Grid, *, collecting: bool, mixing: bool) -> None:
        """What the next call of the network does."""
        self.image, self.collecting, self.mixing = image, collecting, mixing and self.map is not None and self.weight > 0

    def keep(self, probabilities: Float[Tensor, "B hw tokens"], grid: Grid) -> None:
        """A layer's softmax map, averaged over heads; nothing happens outside the collecting call."""
        if self.collecting:
            self._seen.setdefault(grid, []).append(probabilities)

    def settle(self) -> None:
        """Average the collected maps of each grid over layers, resize them to the largest grid, average: the map of the next stage."""
        if not self._seen:
            raise ValueError("the network's call left no cross-attention maps; expected some: use map_weight=0 for this network")
        self.grid = max(self._seen, key=lambda grid: grid[0] * grid[1])
        dtype = self._seen[self.grid][0].dtype
        layers = [torch.stack(maps).to(at_least_single(dtype)).mean(0) for maps in self._seen.values()]
        sized = [resize_map(each, grid, self.grid, self.resize) for each, grid in zip(layers, self._seen, strict=True)]
        self.first_grid = self.grid if self.map is None else self.first_grid
        self.map, self._seen, self._resized = torch.stack(sized).mean(0).to(dtype), {}, {}

    def at(self, grid: Grid) -> Float[Tensor, "B hw tokens"]:
        """The stored map for queries on a grid."""
        if self.map is None:
            raise ValueError("no map is stored; expected a stage that has ended: call settle() after its last call")
        if grid not in self._resized:
            self._resized[grid] = resize_map(self.map, self.grid, grid, self.resize)
        return self._resized[grid]

    def read(self, values: Float[Tensor, "B tokens width"], grid: Grid) -> Float[Tensor, "B hw width"]:
        """M V: what the stored map takes from this layer's values."""
        stored = self.at(grid)
        if stored.shape[0] != values.shape[0] or stored.shape[2] != values.shape[1]:
            raise ValueError(
                f"values of {tuple(values.shape)} meet a map of {tuple(stored.shape)}; expected the batch and the tokens of the stage before"
            )
        return stored.to(values) @ values

    def mix(self, out: Float[Tensor, "B hw width"], values: Float[Tensor, "B tokens width"], grid: Grid) -> Float[Tensor, "B hw width"]:
        """(1 - w_c) out + w_c M V in a later stage, `out` as it is before."""
        return torch.lerp(out, self.read(values, grid), self.weight) if self.mixing else out


class MapReuseProcessor:
    """An attention processor of diffusers that runs another one, leaves its map to a store, and mixes the stored map in.

    What follows attention is affine and the map's rows have sum 1, so the projection is applied to the few values rather than to M V,
    and fused attention stays as it is. In the joint attention of SD3 the maps are of image queries to text keys alone, and M V is added
    with the weight w_c tokens / (queries of the first stage).

    Args:
        store: shared by all layers.
        processor: the one that the layer has.
    """

    def __init__(self, store: MapStore, processor: Any) -> None:
        self.store, self.processor = store, processor

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **words: Any,
    ) -> Any:
        out = self.processor(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **words)
        store = self.store
        if encoder_hidden_states is None or not (store.collecting or store.mixing):
            return out
        if isinstance(encoder_hidden_states, tuple):
            raise ValueError("an IP-Adapter gives attention images beside text; expected text alone: use map_weight=0")
        grid = query_grid(hidden_states.shape[1], store.image)
        if attn.norm_cross:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
        joint = isinstance(out, tuple)
        if store.collecting:
            store.keep(_probabilities(attn, hidden_states, encoder_hidden_states, attention_mask, joint), grid)
        if not store.mixing:
            return out
        project = attn.to_out[0]
        if joint:
            share = store.weight * encoder_hidden_states.shape[1] / math.prod(store.first_grid)
            added = store.read(F.linear(attn.add_v_proj(encoder_hidden_states), project.weight), grid)
            return out[0] + share * added, *out[1:]
        values, rest = project(attn.to_v(encoder_hidden_states)), hidden_states if attn.residual_connection else 0
        if attn.residual_connection or attn.rescale_output_factor != 1:
            return torch.lerp(out, (store.read(values, grid) + rest) / attn.rescale_output_factor, store.weight)
        return store.mix(out, values, grid)


def _probabilities(attn: Any, image: Tensor, text: Tensor, mask: Tensor | None, joint: bool) -> Float[Tensor, "B hw tokens"]:
    """softmax(Q K^T / sqrt d), averaged over heads."""

    def heads(x: Tensor, norm: Any) -> Tensor:
        split = x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        return (split if norm is None else norm(split)).flatten(0, 1)

    query = heads(attn.to_q(image), attn.norm_q)
    key = heads(attn.add_k_proj(text), attn.norm_added_k) if joint else heads(attn.to_k(text), attn.norm_k)
    if mask is not None and not joint:
        mask = attn.prepare_attention_mask(mask, text.shape[1], len(image))
    scores = attn.get_attention_scores(query, key, None if joint else mask)
    return scores.unflatten(0, (len(image), attn.heads)).mean(1)
