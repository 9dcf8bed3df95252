"""Cross-attention maps: kept, resized, mixed."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from fewer.diffusion import MapReuseProcessor, MapStore
from fewer.diffusion.frecas import resize_map
from fewer.diffusion.frecas.maps import query_grid

GRID, LARGE, TOKENS = (4, 6), (7, 12), 5


def maps_of(batch: int = 2, grid=GRID) -> torch.Tensor:
    return torch.randn(batch, grid[0] * grid[1], TOKENS).mul(2).softmax(-1)


@pytest.mark.parametrize("how", ["2d", "released"])
def test_rows_keep_their_sum_and_equal_sizes_are_the_identity(how):
    given = maps_of()
    assert torch.equal(resize_map(given, GRID, GRID, how), given)
    for to in (LARGE, (2, 3)):
        sums = resize_map(given, GRID, to, how).sum(-1)
        assert sums.shape == (2, to[0] * to[1])
        torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-5, rtol=0)


def test_a_map_constant_along_the_width_stays_so_but_not_when_flattened():
    given = maps_of(grid=(4, 1)).repeat_interleave(6, dim=1)
    rows = resize_map(given, GRID, (8, 12)).unflatten(1, (8, 12))
    torch.testing.assert_close(rows, rows[:, :, :1].expand_as(rows), atol=1e-6, rtol=0)
    flat = resize_map(given, GRID, (8, 12), "released").unflatten(1, (8, 12))
    assert (flat - flat[:, :, :1]).abs().max() > 0.01


def test_half_precision_and_strided_maps():
    given = maps_of()
    half = resize_map(given.bfloat16(), GRID, LARGE)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), resize_map(given, GRID, LARGE), atol=0.01, rtol=0)
    strided = given.mT.contiguous().mT
    assert torch.equal(resize_map(strided, GRID, LARGE), resize_map(given, GRID, LARGE))


def test_layers_of_a_grid_are_averaged_before_grids_are_and_halves_stay_apart():
    store, small = MapStore(0.6), (2, 3)
    one, two, three = maps_of(), maps_of(), maps_of(grid=small)
    store.keep(one, GRID)  # outside the collecting call
    store.turn(GRID, collecting=True, mixing=False)
    for each, grid in ((one, GRID), (three, small), (two, GRID)):
        store.keep(each, grid)
    store.settle()
    assert store.map is not None
    wanted = ((one + two) / 2 + resize_map(three, small, GRID)) / 2
    torch.testing.assert_close(store.map, wanted)
    assert (store.map[0] - store.map[1]).abs().max() > 0.01
    values = torch.randn(2, TOKENS, 8)
    out = torch.randn(2, 24, 8)
    assert store.mix(out, values, GRID) is out, "the first stage mixes nothing"
    store.turn(GRID, collecting=False, mixing=True)
    torch.testing.assert_close(store.mix(out, values, GRID), 0.4 * out + 0.6 * wanted @ values)
    with pytest.raises(ValueError, match="expected the batch and the tokens"):
        store.mix(out[:1], values[:1], GRID)


def test_nothing_collected_is_an_error():
    with pytest.raises(ValueError, match="left no cross-attention maps"):
        MapStore(0.5).settle()
    with pytest.raises(ValueError, match=r"weight is 2.0; expected a number from 0 to 1"):
        MapStore(2.0)
    with pytest.raises(ValueError, match="resize is '3d'; expected one of 2d, released"):
        MapStore(0.5, "3d")
    with pytest.raises(ValueError, match="no map is stored"):
        MapStore(0.5).at(GRID)


def test_queries_lie_on_halvings_of_the_image():
    assert [query_grid(n, (9, 13)) for n in (117, 35, 12)] == [(9, 13), (5, 7), (3, 4)]
    with pytest.raises(ValueError, match="no halving"):
        query_grid(36, (9, 13))


@pytest.mark.parametrize("words", [{}, {"residual_connection": True, "rescale_output_factor": 2.0}, {"qk_norm": "layer_norm"}])
def test_the_processor_keeps_softmax_maps_and_mixes_before_the_projection(words):
    torch.manual_seed(0)
    attn = Attention(8, cross_attention_dim=6, heads=2, dim_head=4, processor=AttnProcessor2_0(), **words).eval()
    for each in attn.parameters():
        torch.nn.init.normal_(each, std=0.5)
    image, text, store = torch.randn(2, 24, 8), torch.randn(2, TOKENS, 6), MapStore(0.6)
    plain = attn(image, text)
    attn.set_processor(MapReuseProcessor(store, AttnProcessor2_0()))
    store.turn(GRID, collecting=True, mixing=False)
    assert torch.equal(attn(image, text), plain)
    store.settle()

    def heads(x, norm):
        return norm(x.unflatten(-1, (2, 4)).transpose(1, 2)) if norm else x.unflatten(-1, (2, 4)).transpose(1, 2)

    scores = heads(attn.to_q(image), attn.norm_q) @ heads(attn.to_k(text), attn.norm_k).mT / 2
    each = scores.softmax(-1)
    torch.testing.assert_close(store.map, each.mean(1), atol=1e-6, rtol=0)
    ones = torch.ones(2, 24)
    torch.testing.assert_close(store.map.sum(-1), ones, atol=1e-5, rtol=0)

    store.turn(GRID, collecting=False, mixing=True)
    values = attn.to_v(text)
    inner = (each @ heads(values, None)).transpose(1, 2).flatten(2)
    wanted = attn.to_out[0](0.4 * inner + 0.6 * each.mean(1) @ values)
    wanted = (wanted + image if words.get("residual_connection") else wanted) / words.get("rescale_output_factor", 1)
    torch.testing.assert_close(attn(image, text), wanted, atol=1e-5, rtol=1e-5)
    store.weight = 0.0
    store.turn(GRID, collecting=False, mixing=True)
    assert torch.equal(attn(image, text), plain)
