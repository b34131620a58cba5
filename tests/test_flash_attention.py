"""One suite for every implementation of flash attention, against a float64 reference."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu
from jax.experimental.pallas import tpu as pltpu
from qed_kernels import choice, hopper
from qed_kernels import flash_attention as fa
from qed_kernels.flash_attention import cudnn, pallas_gpu, pallas_tpu, tiles
from qed_kernels.flash_attention.shapes import SMALL, Shape

from qed_jax.model import attention, qwen3
from qed_jax.records import Batch
from qed_jax.sharding import make_mesh

FAST = ["xla", "pallas_tpu"]  # in its interpreter
NEEDS_GPU_INTERPRETER = pytest.mark.skipif(
  not hasattr(mosaic_gpu, "InterpretGPUParams"),
  reason="the interpreter of GPU kernels came with jax 0.11",
)
NAMES = ("o", "lse", "dq", "dk", "dv")
LIMITS = {
  "float32": dict.fromkeys(NAMES, 1e-5),
  "bfloat16": dict.fromkeys(NAMES, 1e-2) | {"o": 5e-3, "lse": 5e-3},
}


def draw(shape: Shape, seed: int = 0, dtype: str = "float32"):
  """q, k, v, the cotangents of o and lse, and ragged segments."""
  rng = np.random.default_rng(seed)
  B, T, N, K, H = shape.B, shape.T, shape.N, shape.K, shape.H
  sizes = ((B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H), (B, T, N))
  arrays = [jnp.asarray(rng.standard_normal(size), dtype) for size in sizes]
  arrays[4] = arrays[4].astype("float32")
  segments_BT = np.sort(rng.integers(1, shape.segments + 1, (B, T)), axis=1)
  return arrays, segments_BT


def make_program(name: str, scale):
  """An implementation as one jitted program -> (o, lse, dq, dk, dv)."""

  @jax.jit
  def both(q, k, v, do, dlse, segments_BT):
    rows = fa.pack(segments_BT, q.shape[2], k.shape[2], q.shape[3], name)
    attend = lambda q, k, v: fa.flash_attention(q, k, v, rows, scale=scale, implementation=name)  # noqa: E731
    out, pull = jax.vjp(attend, q, k, v)
    return *out, *pull((do, dlse))

  return both


same_program = functools.cache(make_program)  # for tests that change nothing in it


def run(name: str, arrays, segments_BT, scale=None, make=make_program):
  """What the implementation computes, as numpy arrays of float32 or more."""
  found = make(name, scale)(*arrays, segments_BT)
  return [np.asarray(x.astype(jnp.promote_types(x.dtype, "float32"))) for x in found]


def expected(arrays, segments_BT, scale=None):
  with jax.enable_x64(True):
    wide = [jnp.asarray(np.asarray(x.astype("float32")), "float64") for x in arrays]
    return run("reference", wide, segments_BT, scale, same_program)


def assert_close(found, wanted, limits) -> None:
  for name, x, y in zip(NAMES, found, wanted, strict=True):
    assert np.isfinite(x).all(), name
    error = np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-6 * np.sqrt(y.size))
    assert error <= limits[name], (name, error)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("name", FAST)
def test_values_and_gradients_are_those_of_the_reference(name, shape, dtype):
  """Output, log-sum-exp and the gradients of both, of ragged segments."""
  arrays, segments_BT = draw(shape, dtype=dtype)
  assert_close(run(name, arrays, segments_BT), expected(arrays, segments_BT), LIMITS[dtype])


SHARES = [(40, 120), (77, 700), (300, 1500), (1100, 2100)]


@pytest.mark.parametrize(
  ("name", "T", "S"),
  [
    *((name, T, S) for name in FAST for T, S in SHARES),
    pytest.param("pallas_gpu", 130, 300, marks=NEEDS_GPU_INTERPRETER),
  ],
)
def test_queries_of_the_last_tokens_alone(name, T, S, monkeypatch):
  """A share of a row: values and gradients are those of the whole row with the other queries left
  out, in several backward calls too."""
  monkeypatch.setattr(pallas_tpu, "QUERY_GRADIENTS", 2 * 64 * 4 * 1024)
  dtype = "bfloat16" if name == "pallas_gpu" else "float32"
  (q, k, v, do, dlse), segments_BT = draw(Shape(2, S, 4, 2, 64, 2), dtype=dtype)
  others = jnp.arange(S)[None, :, None] < S - T
  arrays = (q, k, v, jnp.where(others[..., None], 0, do), jnp.where(others, 0, dlse))
  o, lse, dq, dk, dv = expected(arrays, segments_BT)

  @jax.jit
  def last(q, k, v, do, dlse):
    start_BT = fa.segment_starts(segments_BT)[:, S - T :]
    rows = fa.pack_starts(start_BT, S, 4, 2, 64, name)
    attend = lambda *qkv: fa.flash_attention(*qkv, rows, implementation=name)  # noqa: E731
    out, pull = jax.vjp(attend, q, k, v)
    return *out, *pull((do, dlse))

  found = last(*(x[:, S - T :] if x is not k and x is not v else x for x in (q, k, v, do, dlse)))
  wanted = (*(x[:, S - T :] for x in (o, lse, dq)), dk, dv)
  assert_close([np.asarray(x.astype("float32")) for x in found], wanted, LIMITS[dtype])


@settings(max_examples=12, deadline=None)
@given(st.data())
@pytest.mark.parametrize("name", FAST)
def test_any_layout_of_segments(name, data):
  """Segments of any lengths, with any ids, those of one token among them; any scale."""
  T = data.draw(st.sampled_from([96, 384]))
  cuts = data.draw(st.sets(st.integers(1, T - 1), max_size=9))
  ids = data.draw(st.lists(st.integers(0, 3), min_size=10, max_size=10))
  segments = np.zeros(T, np.int32)
  for i, cut in enumerate(sorted(cuts)):
    segments[cut:] = 2 * i + 1 if ids[i] else 2 * i + 2
  arrays, _ = draw(Shape(1, T, 2, 1, 64, 1), seed=data.draw(st.integers(0, 99)))
  scale = data.draw(st.sampled_from([None, 0.5, 1.0]))
  found = run(name, arrays, segments[None], scale, same_program)
  assert_close(found, expected(arrays, segments[None], scale), LIMITS["float32"])


def test_a_row_of_several_backward_calls(monkeypatch):
  """Where dQ of all queries does not fit, dK and dV are sums over calls."""
  monkeypatch.setattr(pallas_tpu, "QUERY_GRADIENTS", 2 * 64 * 4 * 1024)
  shape = Shape(1, 2100, 2, 1, 64, 2)
  assert len(pallas_tpu.calls(pallas_tpu.blocks(shape.T, shape.T), 2, 64)) == 3
  arrays, segments_BT = draw(shape)
  assert_close(
    run("pallas_tpu", arrays, segments_BT), expected(arrays, segments_BT), LIMITS["float32"]
  )


def test_nothing_unwritten_is_read_and_nothing_races(monkeypatch):
  """The TPU's simulator: memory starts as nan, and accesses that are not ordered are reported."""
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  how = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
  forward, backward = pallas_tpu.forward, pallas_tpu.backward
  monkeypatch.setattr(pallas_tpu, "forward", lambda scale, _, *rest: forward(scale, how, *rest))
  monkeypatch.setattr(pallas_tpu, "backward", lambda scale, _, *rest: backward(scale, how, *rest))
  arrays, segments_BT = draw(Shape(2, 300, 2, 1, 128, 3))
  found = run("pallas_tpu", arrays, segments_BT)
  assert_close(found, expected(arrays, segments_BT), LIMITS["float32"])
  assert not interpret_pallas_call.races.races_found


HOPPER = {
  "key blocks not seen by all": Shape(1, 300, 4, 2, 128, 3),
  "rows, padding, small heads": Shape(2, 130, 2, 1, 64, 2),
  "one head each": Shape(1, 256, 2, 2, 64, 1),
}


@NEEDS_GPU_INTERPRETER
@pytest.mark.parametrize("shape", HOPPER.values(), ids=HOPPER)
def test_the_hopper_kernels(shape, monkeypatch):
  """Values and gradients, in jax's interpreter of GPU kernels: memory starts as nan there, and
  accesses that no barrier or fence orders are an error."""
  how = mosaic_gpu.InterpretGPUParams(detect_races=True)
  monkeypatch.setattr(hopper, "interpreter", lambda name: how)
  arrays, segments_BT = draw(shape, dtype="bfloat16")
  found = run("pallas_gpu", arrays, segments_BT)
  assert_close(found, expected(arrays, segments_BT), LIMITS["bfloat16"])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=cudnn.SEGMENTS + 3))
def test_segments_as_cudnn_takes_them(lengths):
  """Lengths and first tokens in order, and whether there is room for all; it runs on a GPU only."""
  T, M = 9 * (cudnn.SEGMENTS + 3), cudnn.SEGMENTS
  lengths = [*lengths, T - sum(lengths)] if sum(lengths) < T else lengths
  first = np.cumsum([0, *lengths[:-1]])
  start_BT = np.repeat(first, lengths)[None]
  plan = jax.jit(cudnn.plan, static_argnums=(1, 2, 3))(jnp.asarray(start_BT), T, 1, 64)
  fits = len(lengths) <= M
  assert bool(plan.fit_B[0]) == fits
  if fits:
    assert plan.length_BM[0].tolist() == [*lengths, *[-1] * (M - len(lengths))]
    assert plan.offset_Bm[0].tolist() == [*first.tolist(), *[-1] * (M + 1 - len(lengths))]
  arrays, segments_BT = draw(Shape(1, 32, 2, 1, 64, 2), dtype="bfloat16")
  with pytest.raises(NotImplementedError, match="cudnn: cpu is no GPU"):
    run("cudnn", arrays, segments_BT)


def lowered_for_hopper(program, *arguments) -> str:
  """The program for an H200, before ptxas."""
  device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
  mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    return jax.jit(program).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def test_the_hopper_kernels_lower(monkeypatch):
  """At the sizes of Qwen3-4B; and what does not fit into shared memory is refused here already."""
  arrays, segments_BT = draw(Shape(1, 512, 8, 2, 128, 2), dtype="bfloat16")
  program = functools.partial(make_program("pallas_gpu", None), segments_BT=segments_BT)
  assert lowered_for_hopper(program, *arrays).count("@mosaic_gpu") == 3
  monkeypatch.setattr(pallas_gpu, "SLOTS", 8)
  program = functools.partial(make_program("pallas_gpu", None), segments_BT=segments_BT)
  with pytest.raises(ValueError, match="shared memory|SMEM"):
    lowered_for_hopper(program, *arrays)


def test_the_same_bits_each_time():
  """The order of every sum is fixed."""
  arrays, segments_BT = draw(SMALL["off every block"], dtype="bfloat16")
  first, second = (run("pallas_tpu", arrays, segments_BT) for _ in range(2))
  assert all((x == y).all() for x, y in zip(first, second, strict=True))


list_tiles = jax.jit(tiles.tiles, static_argnums=(1, 2, 3, 4))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_tiles_are_those_that_a_brute_force_finds(data):
  """In both orders, of any stretch of queries: every tile with something to see once, whole groups
  between FIRST and LAST, MASKED exactly where something is not seen, idle entries repeat."""
  query_block, key_block = data.draw(st.sampled_from([(2, 4), (4, 2), (4, 4), (2, 8)]))
  T = 8 * data.draw(st.integers(1, 3))
  first = data.draw(st.sampled_from([0, 8])) if T > 8 else 0
  by = data.draw(st.sampled_from(["query", "key"]))
  cuts = data.draw(st.lists(st.sets(st.integers(1, T - 1), max_size=5), min_size=2, max_size=2))
  start_BT = np.zeros((2, T), np.int32)
  for b, row in enumerate(cuts):
    for cut in sorted(row):
      start_BT[b, cut:] = cut
  found = list_tiles(jnp.asarray(start_BT[:, first:]), query_block, key_block, by, first)
  found = jax.tree.map(np.asarray, found)
  t, s = np.arange(T)[:, None], np.arange(T)[None]
  for b in range(2):
    seen_TS = (start_BT[b][:, None] <= s) & (s <= t)
    wanted = {}
    for query in range((T - first) // query_block):
      for key in range(T // key_block):
        rows = slice(first + query * query_block, first + (query + 1) * query_block)
        part = seen_TS[rows, key * key_block : (key + 1) * key_block]
        if part.any():
          wanted[query, key] = not part.all()
    count = found.count_B[b]
    listed = list(zip(found.query_BX[b].tolist(), found.key_BX[b].tolist(), strict=True))
    flags = found.flags_BX[b]
    assert len(set(listed[:count])) == count and set(listed[:count]) == set(wanted)
    assert [bool(f & tiles.MASKED) for f in flags[:count]] == [
      wanted[tile] for tile in listed[:count]
    ]
    assert (flags[:count] & tiles.VALID > 0).all() and (flags[count:] == 0).all()
    assert set(listed[count:]) <= {listed[count - 1]}
    group = [tile[by == "key"] for tile in listed[:count]]
    edges = [i for i in range(count) if i == 0 or group[i] != group[i - 1]]
    assert [i for i in range(count) if flags[i] & tiles.FIRST] == edges
    assert [i for i in range(count) if flags[i] & tiles.LAST] == [
      *(i - 1 for i in edges[1:]),
      count - 1,
    ]
    assert len(edges) == len(set(group)) == found.touched_BG[b].sum()


def test_segments_and_the_diagonal_cost_no_step():
  """Eight segments in 16k tokens are a fraction of the tiles of one."""
  start = lambda n: jnp.asarray(np.arange(16_384) // (16_384 // n) * (16_384 // n))[None]  # noqa: E731
  count = lambda n, by: int(tiles.tiles(start(n), 256, 1024, by).count_B[0])  # noqa: E731
  assert count(1, "query") == count(1, "key") == 16 * 17 // 2 * 4
  assert count(8, "query") == count(8, "key") == 8 * (2 * 3 // 2) * 4


@pytest.mark.parametrize(
  ("changes", "said"),
  [({"H": 80}, "head_dim 80"), ({"N": 3, "K": 2}, "3 query heads")],
)
def test_what_the_kernel_cannot_do_it_refuses(changes, said):
  """One line that names the limit, when it is asked for; in "auto" the next one serves."""
  arrays, segments_BT = draw(dataclasses.replace(Shape(1, 32, 2, 1, 64, 2), **changes))
  with pytest.raises(NotImplementedError, match=said):
    run("pallas_tpu", arrays, segments_BT)
  with pytest.raises(NotImplementedError, match=said):
    run("pallas_gpu", arrays, segments_BT)
  for name, dtype in (("pallas_tpu", "float16"), ("pallas_gpu", "float32")):
    with pytest.raises(NotImplementedError, match=f"{name}: {dtype}"):
      run(name, draw(Shape(1, 32, 2, 1, 64, 2), dtype=dtype)[0], segments_BT)


def test_auto_falls_through_and_says_so_once(monkeypatch, caplog):
  """On a TPU "auto" asks the kernel first; the log has one line of who serves and why."""
  monkeypatch.setattr(fa, "on_tpu", lambda: True)
  arrays, segments_BT = draw(Shape(1, 32, 2, 1, 80, 2))
  choice.say.cache_clear()
  with caplog.at_level(logging.INFO, logger="qed_kernels"):
    for _ in range(2):
      found = run("auto", arrays, segments_BT)
  assert_close(found, expected(arrays, segments_BT), LIMITS["float32"])
  assert [r.message for r in caplog.records] == [
    "flash_attention: xla; pallas_tpu: head_dim 80 is not 64, 128, 192 or 256"
  ]


def test_an_unknown_implementation_is_one_line():
  with pytest.raises(
    ValueError, match="'triton': choose auto, reference, xla, pallas_tpu, pallas_gpu, cudnn"
  ):
    fa.candidates("triton")


def model_and_batch(**changes):
  """A small model with heads that the kernel takes, and packed rows with padding."""
  config = qwen3.Qwen3Config(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=8, num_kv_heads=2,
    head_dim=64, rope_theta=1e4, max_position=512, rms_norm_eps=1e-6, tie_word_embeddings=True,
    dtype="float32", remat="layer", attention="xla",
  )  # fmt: skip
  rng = np.random.default_rng(0)
  segments_BT = np.sort(rng.integers(1, 4, (8, 160)), axis=1)
  segments_BT[:, 150:] = 0
  position_BT = np.tile(np.arange(160), (8, 1))
  tokens_BT = rng.integers(0, 64, (8, 160))
  batch = Batch(
    *(x.astype(np.int32) for x in (tokens_BT, position_BT, segments_BT)), np.ones((8, 160))
  )
  return dataclasses.replace(config, **changes), batch


def loss_and_gradient(config, params, batch):
  def loss(params):
    logp_BT, _ = qwen3.score(config, params, batch, 1.0, 64)
    return jnp.sum(logp_BT) / logp_BT.size

  return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("shape", [None, (2, 2, 2)], ids=["one device", "data, fsdp and tensor"])
def test_the_model_trains_with_the_kernel(shape):
  """Loss and gradients of the whole model are those of plain XLA, on one device and on eight."""
  xla, batch = model_and_batch()
  kernel, _ = model_and_batch(attention="pallas_tpu")
  params = qwen3.init_params(xla, jax.random.key(0), jnp.float32)
  wanted = loss_and_gradient(xla, params, batch)
  if shape is None:
    found = loss_and_gradient(kernel, params, batch)
  else:
    with jax.set_mesh(make_mesh(*shape)):
      found = loss_and_gradient(kernel, params, batch)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=2e-6, rtol=2e-4)


def test_key_heads_that_do_not_split_are_left_to_xla():
  """Query heads of a device must find their keys there: "auto" steps back, the kernel refuses."""
  kernel, batch = model_and_batch(attention="pallas_tpu")
  params = qwen3.init_params(kernel, jax.random.key(0), jnp.float32)
  with jax.set_mesh(make_mesh(1, 2, 4)):
    with pytest.raises(NotImplementedError, match="2 key heads do not split over tensor=4"):
      loss_and_gradient(kernel, params, batch)
    assert attention.implementation_for(dataclasses.replace(kernel, attention="auto")) == "xla"
