"""The paged cache against a plain dict of tokens: what is written where, copied, rounded, read."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qed_jax.model import attention
from qed_jax.model import kv_cache as kv

# Layers, pages, key heads, tokens of a page, head size; sequences, pages of a table, new tokens.
L, PAGES, K, S, H = 2, 11, 2, 4, 8
B, P, T = 3, 3, 5
SIZES = dataclasses.make_dataclass("Sizes", ["num_layers", "num_kv_heads", "head_dim"])(L, K, H)

append = jax.jit(kv.append)
read = jax.jit(kv.read, static_argnums=2)
gather = jax.jit(kv.gather)
scatter = jax.jit(kv.scatter, static_argnums=5)
copy = jax.jit(kv.copy)
cache_attention = jax.jit(attention.cache_attention)


def create(dtype="float32"):
  return kv.create(SIZES, PAGES, S, dtype, by_layer=False)


def normal(rng, *shape):
  """Numbers whose sizes differ by head and token, as those of keys do."""
  scale = np.exp(rng.normal(size=(*shape[:-1], 1)))
  return (scale * rng.normal(size=shape)).astype(np.float32)


def new_tokens(rng, positions=None):
  """k, v [B, T, K, H] and positions [B, T]: distinct ones of a sequence, some padding, some past
  the end of the table."""
  if positions is None:
    positions = np.stack([rng.permutation(P * S + 4)[:T] for _ in range(B)])
    positions = np.where(rng.random((B, T)) < 0.2, -1, positions)
  return normal(rng, B, T, K, H), normal(rng, B, T, K, H), positions.astype(np.int32)


def shuffled_table(rng, pages=B * P):
  """Pages of their own for every sequence, in no order; page 0 is nobody's."""
  return (1 + rng.permutation(PAGES - 1)[:pages]).reshape(-1, P).astype(np.int32)


def arrays(cache) -> dict:
  """Its pages and scales as numpy, by name."""
  fields = {f.name: getattr(cache, f.name) for f in dataclasses.fields(cache)}
  return {name: np.asarray(x) for name, x in fields.items() if x is not None}


def same(one, other):
  one, other = arrays(one), arrays(other)
  assert one.keys() == other.keys()
  for name, x in one.items():
    np.testing.assert_array_equal(x, other[name], err_msg=name)


def filled(rng, dtype="float32"):
  """A cache whose pages all hold something, and a table of it."""
  table_BP = shuffled_table(rng)
  cache = kv.with_table(create(dtype), table_BP)
  for layer in range(L):
    positions_BT = np.broadcast_to(np.arange(P * S), (B, P * S)).astype(np.int32)
    k, v = normal(rng, B, P * S, K, H), normal(rng, B, P * S, K, H)
    cache = append(cache, layer, k, v, positions_BT)
  return cache, table_BP


SEEDS = st.integers(0, 2**32 - 1).map(np.random.default_rng)
FEW = settings(max_examples=40, deadline=None)


# --- what is written is what is read


@FEW
@given(SEEDS)
def test_reads_are_of_what_was_written_last(rng):
  """Any order of positions and calls, a table of shuffled pages; everything else stays zero."""
  table_BP, layer = shuffled_table(rng), int(rng.integers(L))
  cache = kv.with_table(create(), table_BP)
  expected = {}
  for _ in range(4):
    k_BTKH, v_BTKH, positions_BT = new_tokens(rng)
    cache = append(cache, layer, k_BTKH, v_BTKH, positions_BT)
    for b, t in np.ndindex(B, T):
      if 0 <= positions_BT[b, t] < P * S:
        expected[b, positions_BT[b, t]] = k_BTKH[b, t], v_BTKH[b, t]
  k_BKSH, v_BKSH = map(np.asarray, read(cache, layer, "float32"))
  wanted_k, wanted_v = np.zeros_like(k_BKSH), np.zeros_like(v_BKSH)
  for (b, position), (k_KH, v_KH) in expected.items():
    wanted_k[b, :, position], wanted_v[b, :, position] = k_KH, v_KH
  np.testing.assert_array_equal(k_BKSH, wanted_k)
  np.testing.assert_array_equal(v_BKSH, wanted_v)
  untouched = sorted({*range(PAGES)} - {*table_BP.ravel().tolist()})
  for x_LPKSH in (cache.k_LPKSH, cache.v_LPKSH):
    assert not np.any(x_LPKSH[:, np.array(untouched)])
    assert not np.any(x_LPKSH[1 - layer])


@FEW
@given(SEEDS)
def test_a_cache_without_a_table_is_one_page_a_sequence(rng):
  """table_BP of None and a table that says the same write and read the same."""
  wide = dataclasses.replace(create(), table_BP=None)
  numbered = kv.with_table(wide, np.arange(PAGES, dtype=np.int32)[:, None])
  positions_BT = np.where(rng.random((PAGES, 2)) < 0.2, -1, rng.integers(0, S + 2, (PAGES, 1)))
  positions_BT = (positions_BT + np.array([[0, 1]]) * (positions_BT >= 0)).astype(np.int32)
  k, v = normal(rng, PAGES, 2, K, H), normal(rng, PAGES, 2, K, H)
  wide, numbered = (append(c, 1, k, v, positions_BT) for c in (wide, numbered))
  same(wide, kv.with_table(numbered, None))
  for one, other in zip(read(wide, 1, "float32"), read(numbered, 1, "float32"), strict=True):
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e38])
def test_what_is_not_finite_reaches_those_who_see_it_and_no_others(dtype, bad):
  """The token's key is nan, its value 0: queries from it on are nan, all others are the same to the
  bit, and whoever owns the page next does not notice. In float16 1e38 is infinite."""
  rng = np.random.default_rng(0)
  finite = abs(bad) < float(np.finfo("float16" if dtype == "float16" else "float32").max)
  cache, _ = filled(rng, dtype)
  k_BTKH, v_BTKH, _ = new_tokens(rng)
  at_BT = np.where(np.arange(T) == 0, np.array([[-1], [5], [7]]), -1).astype(np.int32)
  fine = append(cache, 0, k_BTKH, v_BTKH, at_BT)
  k_BTKH, v_BTKH = k_BTKH.copy(), v_BTKH.copy()  # the device may be reading the others yet
  k_BTKH[1, 0, 0, 3], v_BTKH[2, 0] = bad, bad
  spoiled = append(cache, 0, k_BTKH, v_BTKH, at_BT)
  assert np.all(np.isfinite(np.asarray(spoiled.v_LPKSH, np.float32)))
  assert spoiled.v_scale_LPKS is None or np.all(np.isfinite(spoiled.v_scale_LPKS))
  q_BTNH = rng.normal(size=(B, P * S, 2 * K, H)).astype(np.float32)
  positions_BT = np.tile(np.arange(P * S, dtype=np.int32), (B, 1))
  o_BTNH, fine_BTNH = (
    np.asarray(cache_attention(q_BTNH, c, 0, positions_BT)) for c in (spoiled, fine)
  )
  sees_BT = positions_BT >= np.array([[99], [5], [7]])
  np.testing.assert_array_equal(o_BTNH[~sees_BT], fine_BTNH[~sees_BT])
  if finite:
    assert np.all(np.isfinite(o_BTNH))
  else:
    assert np.all(np.isnan(o_BTNH[sees_BT]).any((-1, -2)))
  # The next owner of the pages has tokens of its own where the marks are, or none yet.
  over = append(spoiled, 0, *new_tokens(rng, at_BT))
  np.testing.assert_array_equal(np.isnan(cache_attention(q_BTNH, over, 0, positions_BT)), False)


def test_context_counts_the_tokens_of_a_table():
  assert create().context == S
  assert kv.with_table(create(), np.zeros((B, P), np.int32)).context == P * S


def test_layers_of_their_own_are_caches_of_one_layer():
  """by_layer: a list whose arrays stacked are those of the cache of all layers."""
  apart = kv.create(SIZES, PAGES, S, "int8", by_layer=True)
  whole = arrays(kv.create(SIZES, PAGES, S, "int8", by_layer=False))
  assert len(apart) == L
  for name, x in whole.items():
    assert np.concatenate([arrays(c)[name] for c in apart]).shape == x.shape
  table_BP = np.zeros((B, P), np.int32)
  assert all(c.table_BP is table_BP for c in kv.with_table(apart, table_BP))


# --- side by side, and back


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(max_examples=15, deadline=None)
@given(SEEDS)
def test_decoding_side_by_side_is_decoding_in_pages(dtype, rng):
  """gather, appends of a chunk, scatter: bit for bit the pages that appends in place leave; nobody
  else's page is touched, and a slot that did nothing gives back what it had."""
  cache, table_BP = filled(rng, dtype)
  most = int(rng.choice([1, 3, 5, P * S]))
  first_B = rng.integers(0, P * S, B)
  first_B[rng.integers(B)] = 0
  last_B = np.minimum(first_B + rng.integers(0, most + 1, B), P * S)
  in_place = cache
  working = gather(kv.with_table(cache, None), table_BP)
  assert working.context == P * S
  for layer in range(L):
    k_BTKH, v_BTKH = normal(rng, B, most, K, H), normal(rng, B, most, K, H)
    positions_BT = first_B[:, None] + np.arange(most)
    positions_BT = np.where(positions_BT < last_B[:, None], positions_BT, -1).astype(np.int32)
    in_place = append(in_place, layer, k_BTKH, v_BTKH, positions_BT)
    working = append(working, layer, k_BTKH, v_BTKH, positions_BT)
    for one, other in zip(
      read(in_place, layer, dtype), read(working, layer, dtype), strict=True
    ):  # fmt: skip
      np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
  bounds = (first_B.astype(np.int32), last_B.astype(np.int32))
  back = scatter(kv.with_table(cache, None), working, table_BP, *bounds, most)
  same(back, kv.with_table(in_place, None))


def test_scatter_gives_back_the_pages_that_were_written_and_no_others():
  """A page before the first position and one after the last keep what another may have written."""
  rng = np.random.default_rng(0)
  cache, table_BP = filled(rng)
  working = gather(kv.with_table(cache, None), table_BP)
  working = jax.tree.map(lambda x: x + 1, working)
  first_B, last_B = np.array([0, S, 2 * S - 1], np.int32), np.array([S, S, 2 * S + 1], np.int32)
  back = scatter(kv.with_table(cache, None), working, table_BP, first_B, last_B, S + 1)
  written = {int(p) for p in (table_BP[0, 0], table_BP[2, 1], table_BP[2, 2])}
  for before, after in ((cache.k_LPKSH, back.k_LPKSH), (cache.v_LPKSH, back.v_LPKSH)):
    changed = {p for p in range(PAGES) if np.any(before[:, p] != after[:, p])}
    assert changed == written


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@settings(max_examples=15, deadline=None)
@given(SEEDS)
def test_copies_are_whole_pages(dtype, rng):
  """Several at once, scales too; a target past the end is dropped, the sources stay."""
  cache, _ = filled(rng, dtype)
  cache = kv.with_table(cache, None)
  order = rng.permutation(PAGES)
  source_R, target_R = order[:3].astype(np.int32), order[3:6].astype(np.int32)
  target_R[rng.integers(3)] = PAGES + rng.integers(2)
  expected = {name: x.copy() for name, x in arrays(cache).items()}
  for source, target in zip(source_R, target_R, strict=True):
    if target < PAGES:
      for x in expected.values():
        x[:, target] = x[:, source]
  copied = arrays(copy(cache, source_R, target_R))
  assert len(copied) == (4 if dtype == "int8" else 2)
  for name, x in expected.items():
    np.testing.assert_array_equal(copied[name], x, err_msg=name)


# --- int8


@FEW
@given(SEEDS)
def test_int8_rounds_to_half_a_step_of_its_own_token_and_head(rng):
  """|stored - given| <= max over the head / 254, however large the neighbours are."""
  table_BP = shuffled_table(rng)
  positions_BT = np.stack([rng.permutation(P * S)[:T] for _ in range(B)]).astype(np.int32)
  k_BTKH, v_BTKH, _ = new_tokens(rng, positions_BT)
  k_BTKH[0, 0, 1] = 0  # all zero: nothing to divide by
  v_BTKH[1, 1, 0] *= 1e20
  v_BTKH[1, 2, 0] *= 1e-20
  cache = append(
    kv.with_table(create("int8"), table_BP), 1, k_BTKH, v_BTKH, positions_BT
  )  # fmt: skip
  for given_BTKH, stored_BKSH in zip((k_BTKH, v_BTKH), read(cache, 1, "float32"), strict=True):
    rows = np.arange(B)[:, None]
    stored_BTKH = np.moveaxis(np.asarray(stored_BKSH), 1, 2)[rows, positions_BT]
    step_BTK1 = np.abs(given_BTKH).max(-1, keepdims=True) / 127
    assert np.all(np.abs(stored_BTKH - given_BTKH) <= step_BTK1 * 0.5001)
    np.testing.assert_allclose(
      np.abs(stored_BTKH).max(-1), np.abs(given_BTKH).max(-1), rtol=1e-5
    )  # fmt: skip


@FEW
@given(SEEDS)
def test_int8_of_a_token_depends_on_that_token_alone(rng):
  """The same bytes and scale in one call or another, early or late, at any page and offset,
  whatever the page holds beside it: sharing and recomputing cannot change what is read."""
  k_KH, v_KH = normal(rng, K, H), normal(rng, K, H)
  found = []
  for _ in range(3):
    cache, table_BP = filled(rng, "int8")
    k_BTKH, v_BTKH, positions_BT = new_tokens(rng)
    b, t = int(rng.integers(B)), int(rng.integers(T))
    position = int(rng.integers(P * S))
    positions_BT[b] = np.where(positions_BT[b] == position, -1, positions_BT[b])
    positions_BT[b, t] = position
    k_BTKH[b, t], v_BTKH[b, t] = k_KH, v_KH
    cache = append(cache, 0, k_BTKH, v_BTKH, positions_BT)
    for _ in range(int(rng.integers(3))):
      later_k, later_v, later_BT = new_tokens(rng)
      later_BT[b] = np.where(later_BT[b] == position, -1, later_BT[b])
      cache = append(cache, 0, later_k, later_v, later_BT)
    page, offset = table_BP[b, position // S], position % S
    own = {name: x for name, x in arrays(cache).items() if name != "table_BP"}
    found.append([x[0, page, :, offset].tobytes() for x in own.values()])
  assert len(found[0]) == 4
  assert found[0] == found[1] == found[2]


def test_int8_takes_about_half_of_bfloat16():
  """A byte an element and a float32 a head of 128: 132 bytes for 256. bytes_per_token says so."""
  sizes = dataclasses.replace(SIZES, head_dim=128)

  def bytes_of(dtype):
    cache = kv.create(sizes, PAGES, S, dtype, by_layer=False)
    taken = sum(x.nbytes for x in jax.tree.leaves(cache))
    assert taken == kv.bytes_per_token(sizes, dtype) * PAGES * S
    return taken

  assert bytes_of("int8") / bytes_of("bfloat16") == 132 / 256
  assert bytes_of("bfloat16") * 2 == bytes_of("float32")


# --- attention over it


def queries(rng, T):
  """q and k, v of T new tokens each, and their positions, the last ones of the context."""
  q_BTNH = rng.normal(size=(B, T, 2 * K, H)).astype(np.float32)
  first_B1 = rng.integers(0, P * S - T + 1, (B, 1))
  return q_BTNH, (first_B1 + np.arange(T)).astype(np.int32)


def plain_attention(q_BTNH, k_BKSH, v_BKSH, positions_BT):
  """Softmax attention of each query over the keys up to its position, in float64, in loops."""
  o_BTNH = np.zeros(q_BTNH.shape)
  for b, t, n in np.ndindex(*q_BTNH.shape[:3]):
    seen = slice(0, positions_BT[b, t] + 1)
    k_SH, v_SH = k_BKSH[b, n // 2, seen].astype(float), v_BKSH[b, n // 2, seen].astype(float)
    weight_S = np.exp(k_SH @ q_BTNH[b, t, n] / np.sqrt(H))
    o_BTNH[b, t, n] = weight_S @ v_SH / weight_S.sum()
  return o_BTNH


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_attention_over_pages_is_attention(dtype, T):
  """As numpy's over what is stored; over what was given to the precision of the storage."""
  rng = np.random.default_rng(T)
  cache, table_BP = filled(rng, dtype)
  exact, _ = filled(np.random.default_rng(T))
  q_BTNH, positions_BT = queries(rng, T)
  for layer in range(L):
    o_BTNH = cache_attention(q_BTNH, cache, layer, positions_BT)
    for stored, atol in ((cache, 1e-5), (exact, {"float32": 1e-5}.get(dtype, 0.05))):
      k_BKSH, v_BKSH = map(np.asarray, read(stored, layer, "float32"))
      wanted_BTNH = plain_attention(q_BTNH, k_BKSH, v_BKSH, positions_BT)
      difference = np.abs(o_BTNH - wanted_BTNH).max()
      assert difference <= atol * max(1, np.abs(v_BKSH).max())
  # Side by side, without a table, as decode has them on a CPU.
  if dtype != "int8":
    working = gather(kv.with_table(cache, None), table_BP)
    apart_BTNH = cache_attention(q_BTNH, working, L - 1, positions_BT)
    np.testing.assert_allclose(apart_BTNH, o_BTNH, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_sequence_at_a_time_equals_all_at_once(monkeypatch, dtype):
  """A prefill's large block of scores is made row by row, to the same output."""
  rng = np.random.default_rng(0)
  cache, _ = filled(rng, dtype)
  q_BTNH, positions_BT = queries(rng, 3)
  maps = []
  lax_map = jax.lax.map
  monkeypatch.setattr(jax.lax, "map", lambda *a: maps.append(a) or lax_map(*a))
  at_once = attention.cache_attention(q_BTNH, cache, 1, positions_BT)
  assert not maps
  monkeypatch.setattr(attention, "SCORES_AT_ONCE", B * 3 * P * S - 1)
  by_row = attention.cache_attention(q_BTNH, cache, 1, positions_BT)
  assert len(maps) == 1
  np.testing.assert_allclose(by_row, at_once, atol=1e-6)


@FEW
@given(SEEDS)
def test_what_a_page_held_before_is_not_seen(rng):
  """Tokens after the position, of an earlier owner or of a copied page: no difference in a bit."""
  cache, _ = filled(rng)
  q_BTNH, positions_BT = queries(rng, 3)
  _, _, more = new_tokens(rng)
  last_B1 = positions_BT[:, -1:]
  after_BT = np.where(more > last_B1, more, -1).astype(np.int32)
  k_BTKH, v_BTKH, _ = new_tokens(rng, after_BT)
  other = append(cache, 0, 1e20 * k_BTKH, 1e20 * v_BTKH, after_BT)
  np.testing.assert_array_equal(
    cache_attention(q_BTNH, cache, 0, positions_BT),
    cache_attention(q_BTNH, other, 0, positions_BT),
  )
