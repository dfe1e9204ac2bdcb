"""Visibility's constructors, and the lists of tiles that the kernels walk."""

import json
import pathlib

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dgr_kernels.attention import Tiles, TileShape, Visibility
from dgr_kernels.attention.tiles import visible_pairs
from hypothesis import given, settings

from dgr_jax.data.sources import load_source
from dgr_jax.tokens.chat import ChatFormat
from dgr_jax.tokens.packing import best_fit
from tests.kernels import checked
from tests.kernels.cases import KINDS, draw_visibility, mask_by_definition

STAR1_LENGTHS = pathlib.Path(__file__).parents[2] / "benchmarks" / "star1_lengths.json"
make_pairs, make_tiles = (jax.jit(make, static_argnums=(1, 2)) for make in (visible_pairs, Tiles.of))
SEE = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]


def test_padding_sees_itself_alone():
    np.testing.assert_array_equal(Visibility.padded(jnp.asarray([2]), 5).mask(5)[0], SEE)
    np.testing.assert_array_equal(Visibility.packed(jnp.asarray([[1, 1, 2, 0, 0]])).mask(5)[0], SEE)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), T=st.sampled_from((1, 7, 40)))
def test_groups_by_definition(seed, T):
    """A token sees its own part up to itself and, of its group's prefix, everything."""
    rng = np.random.default_rng(seed)
    groups = np.sort(rng.integers(0, 4, T))[::-1]
    parts = np.concatenate([np.sort(rng.integers(0, 3, (groups == g).sum())) for g in np.unique(groups)[::-1]])
    visibility = checked.grouped(jnp.asarray(groups[None]), jnp.asarray(parts[None]))
    s, t = np.arange(T)[None], np.arange(T)[:, None]
    same_group = (groups[s] == groups[t]) & (groups[t] != 0)
    expected = (s == t) | ((s <= t) & same_group & ((parts[s] == parts[t]) | (parts[s] == 0)))
    np.testing.assert_array_equal(visibility.mask(T)[0], expected)
    visibility.check(T)


def test_a_group_without_continuations_is_a_packed_sequence():
    ids = jnp.asarray([[1, 1, 1, 2, 2, 0]])
    packed, grouped = Visibility.packed(ids), Visibility.grouped(ids, jnp.zeros_like(ids))
    np.testing.assert_array_equal(packed.mask(6), grouped.mask(6))


def test_shared_prefix_is_one_group():
    visibility = checked.shared_prefix(2, [1, 2], length=6)
    assert checked.fits(visibility)
    expected = Visibility.grouped(jnp.asarray([[1, 1, 1, 1, 1, 0]]), jnp.asarray([[0, 0, 1, 2, 2, 0]]))
    assert jax.tree.all(jax.tree.map(np.array_equal, visibility, expected))
    with pytest.raises(ValueError, match="length is 4; the prefix and its continuations have 5 tokens"):
        Visibility.shared_prefix(2, [1, 2], length=4)


@pytest.mark.parametrize("tile_shape", [TileShape(64, 64), TileShape(64, 128), TileShape(128, 64)])
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000), kind=st.sampled_from(KINDS), lengths=st.sampled_from(((1, 1), (130, 230), (300, 300)))
)
def test_lists_hold_exactly_the_tiles_with_visible_pairs(tile_shape, seed, kind, lengths):
    T, S = lengths
    visibility = draw_visibility(np.random.default_rng(seed), kind, 2, T, S)
    mask = mask_by_definition(visibility, S)
    mask = np.pad(mask, ((0, 0), (0, -T % tile_shape.q), (0, -S % tile_shape.k)))
    by_tile = mask.reshape(2, -1, tile_shape.q, mask.shape[2] // tile_shape.k, tile_shape.k).sum((2, 4))
    np.testing.assert_array_equal(make_pairs(visibility, S, tile_shape), by_tile)
    tiles = make_tiles(visibility, S, tile_shape)
    for steps, pairs in ((tiles.by_query, by_tile), (tiles.by_key, by_tile.swapaxes(1, 2))):
        code, listed = steps.code, np.asarray(steps.steps)[: int(steps.starts[-1])]
        row, outer, inner = (np.asarray(read(listed)) for read in (code.row, code.outer, code.inner))
        partial, first, last = (np.asarray(read(listed)) for read in (code.partial, code.first, code.last))
        visited = np.zeros(pairs.shape, int)
        np.add.at(visited, (row, outer, inner), 1)
        idle = ~(pairs > 0).any(-1)
        assert visited.max() == 1 and (visited.sum(-1)[idle] == 1).all()
        np.testing.assert_array_equal(visited[~idle] == 1, pairs[~idle] > 0)
        np.testing.assert_array_equal(partial, pairs[row, outer, inner] < tile_shape.q * tile_shape.k)
        place = row * pairs.shape[1] + outer
        assert (np.diff(place * 2 + partial) >= 0).all()
        np.testing.assert_array_equal(first, np.diff(place, prepend=-1) != 0)
        np.testing.assert_array_equal(last, np.diff(place, append=-1) != 0)
        starts = np.searchsorted(place * 2 + partial, np.arange(2 * pairs.shape[0] * pairs.shape[1] + 1))
        np.testing.assert_array_equal(steps.starts, starts)


def test_more_tiles_than_a_step_can_name_are_refused():
    visibility = jax.eval_shape(lambda: Visibility.causal(1 << 14, 1 << 14))
    with pytest.raises(NotImplementedError, match="split the batch"):
        jax.eval_shape(lambda v: Tiles.of(v, 1 << 14, TileShape(64, 64)), visibility)


def test_count_of_a_causal_row():
    count = checked.count_tiles(Visibility.causal(1, 512), 128, 128)
    assert count == (10, 10, 512 * 513 // 2)


@pytest.mark.parametrize("blocks", [(128, 128), (256, 512)])
def test_eight_continuations_of_a_prefix_skip_what_is_invisible(blocks):
    """The issue's case, 8 x 200 on 2,000; needed tiles are counted from the mask itself."""
    visibility = Visibility.shared_prefix(2000, [200] * 8)
    needed = tiles_of_mask(np.asarray(visibility.mask(3600))[0], *blocks)
    count = checked.count_tiles(visibility, *blocks)
    assert count.needed == needed
    assert count.visited <= 1.15 * needed


def test_packed_star1_skips_what_is_invisible():
    """STAR-1 as scoring packs it, with the Qwen3 tokenizer, in rows of 8,192."""
    lengths = json.loads(STAR1_LENGTHS.read_text())["lengths"]
    rows = [row.members for row in best_fit(lengths, (8192,))]
    ids = np.zeros((len(rows), 8192), np.int32)
    for row, members in enumerate(rows):
        stop = sum(lengths[i] for i in members)
        ids[row, :stop] = np.repeat(np.arange(1, 1 + len(members)), [lengths[i] for i in members])
    few = Visibility.packed(jnp.asarray(ids[:1]))
    mask = np.asarray(few.mask(8192))[0]
    for blocks in ((128, 128), (256, 512)):
        count = checked.count_tiles(Visibility.packed(jnp.asarray(ids)), *blocks)
        assert count.visited <= 1.15 * count.needed
        assert count.visited < checked.count_tiles(Visibility.causal(len(rows), 8192), *blocks).visited / 3
        assert checked.count_tiles(few, *blocks).needed == tiles_of_mask(mask, *blocks)


def test_lengths_are_those_of_star1(dgr_data):
    chat = ChatFormat.from_pretrained(dgr_data / "models" / "qwen3_tokenizer")
    traces = load_source(f"star1:{dgr_data}/safety_train/star1.json")
    assert json.loads(STAR1_LENGTHS.read_text())["lengths"] == [len(chat.render(t).token_ids) for t in traces]


def test_a_count_of_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="keys is 100, fewer than the 200 queries"):
        checked.count_tiles(Visibility.causal(1, 200), 128, 128, keys=100)


def test_a_zero_after_a_continuation_is_no_prefix():
    """It is a part of its own: nobody's tokens leak into the next continuation."""
    visibility = Visibility.grouped(jnp.ones((1, 5), jnp.int32), jnp.asarray([[0, 1, 0, 2, 2]]))
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1]]
    np.testing.assert_array_equal(visibility.mask(5)[0], expected)


def tiles_of_mask(mask: np.ndarray, block_q: int, block_k: int) -> int:
    """Tiles of a mask [T, S] that hold a visible pair."""
    mask = np.pad(mask, ((0, -mask.shape[0] % block_q), (0, -mask.shape[1] % block_k)))
    return int(mask.reshape(mask.shape[0] // block_q, block_q, -1, block_k).any((1, 3)).sum())
