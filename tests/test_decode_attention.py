"""One suite for every implementation of paged decode attention, against a float64 reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu
from jax.experimental.pallas import tpu as pltpu
from qed_kernels import choice, hopper
from qed_kernels import decode_attention as da
from qed_kernels.decode_attention import pallas_gpu, pallas_tpu

from qed_jax.model import kv_cache, qwen3
from qed_jax.sharding import make_mesh

LIMITS = {"float32": 1e-5, "bfloat16": 5e-3, "int8": 1e-5}  # with float32 queries
LAYERS, K, H, PAGE, WIDTH = 2, 2, 128, 128, 4


def draw(lengths, *, T=1, G=2, dtype="float32", seed=0, stale=0.0):
  """New tokens that are the last T of sequences of these lengths, in a pool in random order.

  A length of 0 is a free row. stale: what keys hold where no token is.
  """
  rng = np.random.default_rng(seed)
  B, pages = len(lengths), len(lengths) * WIDTH + 1
  array = lambda *shape: rng.standard_normal(shape).astype("float32")  # noqa: E731
  k_LPKSH, v_LPKSH = array(LAYERS, pages, K, PAGE, H), array(LAYERS, pages, K, PAGE, H)
  table_BP = 1 + rng.permutation(B * WIDTH).reshape(B, WIDTH).astype("int32")
  positions_BT = np.asarray(lengths, "int32")[:, None] - T + np.arange(T, dtype="int32")[None]
  positions_BT = np.where(np.asarray(lengths)[:, None] > 0, positions_BT, -1)
  if stale:
    place_BS = np.arange(WIDTH * PAGE)[None] >= positions_BT[:, :1]
    for b in range(B):
      for p in range(WIDTH):
        k_LPKSH[:, table_BP[b, p], :, place_BS[b].reshape(WIDTH, PAGE)[p]] = stale
  q, new_k, new_v = array(B, T, K * G, H), array(B, T, K, H), array(B, T, K, H)
  rest = (1, jnp.asarray(positions_BT))
  if dtype != "int8":
    q, *pairs = (jnp.asarray(x, dtype) for x in (q, new_k, new_v, k_LPKSH, v_LPKSH))
    cache = da.Cache(*pairs[2:], None, None, jnp.asarray(table_BP))
    return (q, da.Tokens(*pairs[:2], None, None), cache, *rest)
  pairs = [kv_cache.quantise(jnp.asarray(x)) for x in (new_k, new_v, k_LPKSH, v_LPKSH)]
  (new_k, k_scale), (new_v, v_scale), (k, ks), (v, vs) = pairs
  cache = da.Cache(k, v, ks, vs, jnp.asarray(table_BP))
  return (jnp.asarray(q), da.Tokens(new_k, new_v, k_scale, v_scale), cache, *rest)


def expected(q, new, cache, layer, positions_BT):
  with jax.enable_x64(True):
    wide = lambda x: jnp.asarray(np.asarray(x.astype("float32")), "float64")  # noqa: E731
    table_BP = cache.table_BP
    q, new, cache = jax.tree.map(wide, (q, new, dataclasses.replace(cache, table_BP=None)))
    cache = dataclasses.replace(cache, table_BP=table_BP)
    o, cache = da.decode_attention(q, new, cache, layer, positions_BT, implementation="reference")
    return np.asarray(o), jax.tree.map(np.asarray, cache)


def make_program(name: str):
  return jax.jit(lambda *given: da.decode_attention(*given, implementation=name))


same_program = functools.cache(make_program)  # for tests that change nothing in it


def check(name: str, arguments, dtype="float32", make=make_program) -> None:
  """The output to round-off; the pages to the last bit, other layers and pages among them."""
  (o, cache), live_BT = make(name)(*arguments), np.asarray(arguments[4]) >= 0
  wanted_o, wanted = expected(*arguments)
  o = np.asarray(o.astype("float32"))
  assert np.isfinite(o).all()
  error = np.linalg.norm((o - wanted_o)[live_BT]) / np.linalg.norm(wanted_o[live_BT])
  assert error <= LIMITS[dtype], error
  for found, array in zip(jax.tree.leaves(cache), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_array_equal(np.asarray(found.astype("float32")), array.astype("float32"))


RAGGED = [1, 500, 0, 128, 129, 512]  # a first token, free, a full page, one into a page, all


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("G", [1, 4, 9])
@pytest.mark.parametrize("name", ["xla", "pallas_tpu"])
def test_values_and_pages_are_those_of_the_reference(name, G, dtype):
  """Every way to end in a page, free rows, groups below and above a tile's rows."""
  check(name, draw(RAGGED, G=G, dtype=dtype), dtype)


@settings(max_examples=5, deadline=None)
@given(
  st.lists(st.integers(0, WIDTH * PAGE), min_size=3, max_size=3).filter(any), st.integers(0, 9)
)
@pytest.mark.parametrize("name", ["xla", "pallas_tpu"])
def test_any_lengths(name, lengths, seed):
  check(name, draw(lengths, seed=seed), make=same_program)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("lengths", "T"), [([3, 300, 0, 131], 3), ([8, 256, 512, 130], 8)])
@pytest.mark.parametrize("name", ["xla", "pallas_tpu"])
def test_several_new_tokens_a_sequence(name, lengths, T, dtype):
  """Also where they begin on one page and end on the next, and where the last ones are padding."""
  *arguments, positions_BT = draw(lengths, T=T, dtype=dtype)
  check(name, (*arguments, positions_BT.at[1, T - 1 :].set(-1)), dtype)


def test_a_prefill_is_left_to_xla():
  arguments = draw([300], T=40)
  for name in ("pallas_tpu", "pallas_gpu"):
    with pytest.raises(NotImplementedError, match="40 new tokens of 2 heads are over 64 rows"):
      da.decode_attention(*arguments, implementation=name)


@pytest.mark.skipif(
  not hasattr(mosaic_gpu, "InterpretGPUParams"),
  reason="the interpreter of GPU kernels came with jax 0.11",
)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize(
  ("lengths", "T", "G"), [([1, 500, 0, 128], 1, 4), ([3, 130, 0, 449], 3, 2)]
)
def test_the_hopper_kernel(lengths, T, G, dtype, monkeypatch):
  """One and several new tokens, sequences split into parts of two steps, in jax's interpreter of
  GPU kernels: memory starts as nan there, and unordered accesses are an error."""
  how = mosaic_gpu.InterpretGPUParams(detect_races=True)
  monkeypatch.setattr(hopper, "interpreter", lambda name: how)
  monkeypatch.setattr(pallas_gpu, "STEPS", 2)
  arguments = draw(lengths, T=T, G=G, dtype=dtype)
  check("pallas_gpu", (arguments[0].astype("bfloat16"), *arguments[1:]), "bfloat16")


@pytest.mark.parametrize("stale", [np.nan, np.inf])
def test_keys_that_nobody_owns_are_not_seen(stale):
  """Where a page's last owner left a nan key there is no trace of it, until it is written over."""
  arguments = draw([1, 500, 128], stale=stale)
  run = lambda name: da.decode_attention(*arguments, implementation=name)[0]  # noqa: E731
  assert np.isfinite(np.asarray(run("pallas_tpu"))).all()
  np.testing.assert_allclose(run("pallas_tpu"), run("xla"), atol=1e-5)


def test_nothing_unwritten_is_read_and_nothing_races(monkeypatch):
  """The TPU's simulator: memory starts as nan, and accesses that are not ordered are reported."""
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  how = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
  attention = pallas_tpu.attention
  monkeypatch.setattr(pallas_tpu, "attention", lambda scale, _, *rest: attention(scale, how, *rest))
  check("pallas_tpu", draw([1, 300, 0, 128]))
  assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_key_heads_over_two_cores(dtype, monkeypatch):
  """As on a v5p: each core has half of the heads of every page."""
  monkeypatch.setattr(pallas_tpu, "cores", lambda K, stored: 2)
  check("pallas_tpu", draw(RAGGED, G=4, dtype=dtype), dtype)


def test_steps_are_live_pages():
  """Whatever the table could hold: one step for each page with a token in it."""
  table_BP = jnp.arange(600).reshape(3, 200)
  *lists, count = pallas_tpu.work_list(jnp.array([0, 129, 1]), table_BP, PAGE)
  assert count == 3
  visited = [np.asarray(x[:3]).tolist() for x in lists]
  both = pallas_tpu.FIRST | pallas_tpu.LAST
  flags = [pallas_tpu.FIRST, pallas_tpu.LAST, both]
  assert visited == [[1, 1, 2], [200, 201, 400], [0, 128, 0], flags]


@pytest.mark.parametrize(
  ("change_q", "change_k", "said"),
  [
    (lambda q: q, lambda k: k[:, :, :, :64], "pages of 64"),
    (lambda q: q[..., :64], lambda k: k, "head_dim 64"),
    (lambda q: q[:, :, :3], lambda k: k, "3 query heads"),
    (lambda q: q, lambda k: k.astype("float16"), "pages of float16"),
  ],
)
def test_what_the_kernel_cannot_do_it_refuses(change_q, change_k, said):
  q, new, cache, *rest = draw([5, 9])
  cache = dataclasses.replace(cache, k_LPKSH=change_k(cache.k_LPKSH))
  with pytest.raises(NotImplementedError, match=said):
    da.decode_attention(change_q(q), new, cache, *rest, implementation="pallas_tpu")


@pytest.mark.parametrize(("tensor", "dtype"), [(1, "float32"), (2, "float32"), (2, "int8")])
def test_the_model_decodes_with_the_kernel(tensor, dtype):
  """A step of all layers over shared pages: hidden states and pages are those of plain XLA, on one
  device and with the heads over two."""
  config = qwen3.Qwen3Config(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_layers=3, num_heads=8, num_kv_heads=2,
    head_dim=128, rope_theta=1e4, max_position=512, rms_norm_eps=1e-6, tie_word_embeddings=True,
    dtype="float32", remat="none", attention="xla",
  )  # fmt: skip
  params = qwen3.init_params(config, jax.random.key(0), jnp.float32)
  table_BP = jnp.array([[1, 2], [1, 3], [0, 0]], jnp.int32)
  empty = kv_cache.create(config, 4, PAGE, dtype, by_layer=False)

  def step(how, tokens_BT, positions_BT, cache):
    changed = dataclasses.replace(config, attention=how)
    return jax.jit(qwen3.extend, static_argnums=0)(changed, params, tokens_BT, positions_BT, cache)

  prompt_BT = jnp.tile(jnp.arange(140) % 64, (3, 1))
  positions_BT = jnp.where(jnp.arange(3)[:, None] < 2, jnp.arange(140)[None], -1)
  _, cache = step("xla", prompt_BT, positions_BT, kv_cache.with_table(empty, table_BP))
  newest_BT, at_BT = jnp.array([[5], [6], [7]]), jnp.array([[140], [140], [-1]])
  wanted_x, wanted = step("xla", newest_BT, at_BT, cache)
  choice.say.cache_clear()
  with jax.set_mesh(make_mesh(1, 1, tensor, jax.devices()[:tensor])):
    found_x, found = step("pallas_tpu", newest_BT, at_BT, cache)
  assert choice.say.cache_info().currsize  # it was the kernel that ran
  np.testing.assert_allclose(found_x[:2], wanted_x[:2], atol=2e-5 if dtype == "float32" else 2e-2)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    x, y = (np.asarray(pages, "float32") for pages in (x, y))
    if x.ndim > 2:  # not the table; page 0 is nobody's
      np.testing.assert_allclose(x[:, 1:], y[:, 1:], atol=2e-5 if dtype == "float32" else 1)


def test_an_implementation_of_packed_rows_alone_decodes_with_xla(tiny):
  """attention=cudnn is of training and scoring; sampling with the same config goes on."""
  config, params = tiny
  tokens_BT, positions_BT = jnp.array([[3, 4, 5]]), jnp.arange(3)[None]

  def hidden(how):
    cache = kv_cache.with_table(
      kv_cache.create(config, 2, 4, "float32", by_layer=False), jnp.array([[1]], jnp.int32)
    )
    changed = dataclasses.replace(config, attention=how)
    return qwen3.extend(changed, params, tokens_BT, positions_BT, cache)[0]

  np.testing.assert_array_equal(hidden("cudnn"), hidden("xla"))
