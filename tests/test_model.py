"""The model: sizes, who sees whom, scores, decoding, remat, precision, memory of the scores."""

import contextlib
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qed_jax import sharding
from qed_jax.model import hf_weights, kv_cache, presets, qwen3
from qed_jax.records import Batch

# Model cards: parameters, and parameters without the embedding, in billions.
PUBLISHED = {
  "qwen3-0.6b": (0.6, 0.44),
  "qwen3-1.7b": (1.7, 1.4),
  "qwen3-4b": (4.0, 3.6),
  "qwen3-4b-thinking-2507": (4.0, 3.6),
  "qwen3-4b-instruct-2507": (4.0, 3.6),
  "qwen3-8b": (8.2, 6.95),
  "qwen3-14b": (14.8, 13.2),
  "qwen3-32b": (32.8, 31.2),
}


def preset(name, **how):
  return presets.from_preset(
    name, **{"dtype": "bfloat16", "remat": "layer", "attention": "xla"} | how
  )


def random_params(config, dtype=jnp.float32, scale=3.0):
  """Weights large enough that attention and predictions are far from uniform."""
  params = qwen3.flatten(qwen3.init_params(config, jax.random.key(1), dtype))
  for i, (path, x) in enumerate(sorted(params.items())):
    noise = jax.random.normal(jax.random.key(i), x.shape, dtype)
    params[path] = x * (1 + 0.3 * noise) if path.endswith("norm") else x * scale
  for path in {"embed_tokens", "lm_head"} & params.keys():
    params[path] *= 4
  return qwen3.unflatten(params)


def batch_of(tokens_BT, segments_BT=None, positions_BT=None) -> Batch:
  tokens_BT = jnp.asarray(tokens_BT, jnp.int32)
  ones_BT = jnp.ones_like(tokens_BT)
  if positions_BT is None:
    positions_BT = jnp.cumsum(ones_BT, axis=1, dtype=jnp.int32) - 1
  segments_BT = ones_BT if segments_BT is None else segments_BT
  return Batch(tokens_BT, positions_BT, segments_BT, jnp.ones(tokens_BT.shape))


def all_logits(config, params, batch):
  x_BTD = qwen3.hidden(config, params, batch.tokens_BT, batch.positions_BT, batch.segments_BT)
  return qwen3.logits(config, params, x_BTD)


# --- sizes


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
  config = preset(name)
  total = hf_weights.count(config)
  embeddings = (2 - config.tie_word_embeddings) * config.vocab_size * config.hidden_size
  published, body = PUBLISHED[name]
  digits = 2 if body in (0.44, 6.95) else 1
  assert round(total / 1e9, 1) == published
  assert round((total - embeddings) / 1e9, digits) == body


def test_the_4b_model_to_the_parameter():
  """4,022,468,096 parameters in 398 tensors; theta and positions of the 2507 models."""
  config = preset("qwen3-4b-thinking-2507")
  shapes = jax.eval_shape(lambda: qwen3.init_params(config, jax.random.key(0), jnp.bfloat16))
  leaves = qwen3.flatten(shapes)
  assert {path: x.shape for path, x in leaves.items()} == qwen3.shapes(config)
  assert sum(math.prod(x.shape) for x in leaves.values()) == 4_022_468_096
  assert len(list(hf_weights.hf_shapes(config))) == 398
  assert (config.rope_theta, config.max_position) == (5e6, 262_144)
  older = preset("qwen3-4b")
  assert (older.rope_theta, older.max_position) == (1e6, 40_960)


def test_a_preset_that_is_not_there_names_those_that_are():
  with pytest.raises(ValueError, match="no model preset 'qwen3-5b': use one of .*qwen3-4b"):
    preset("qwen3-5b")


def test_config_json_and_back(tiny_with):
  config = tiny_with(rope_theta=5e6, tie_word_embeddings=False, head_dim=24)
  described = presets.to_hf(config, eos_ids=[7, 8], bos_id=None, pad_id=0, dtype="bfloat16")
  how = {"dtype": config.dtype, "remat": config.remat, "attention": config.attention}
  assert presets.from_hf(described, **how) == config
  assert described["eos_token_id"] == 7


# --- who sees whom


def test_gradients_flow_from_the_past_of_the_same_segment_only(tiny_with):
  """d logits[t] / d embedding of token s is zero unless s is in t's segment and s <= t."""
  config = tiny_with(tie_word_embeddings=False)
  params = random_params(config)
  T = 12
  tokens_BT = jnp.arange(T, dtype=jnp.int32)[None]  # all different: row s of the embedding is s
  segments_BT = jnp.array([[1] * 5 + [2] * 4 + [0] * 3])
  positions_BT = jnp.array([[*range(5), *range(4), *range(3)]])

  def influence(segments_BT):
    def logits_T(embedding):
      batch = batch_of(tokens_BT, segments_BT, positions_BT)
      z_BTV = all_logits(config, params | {"embed_tokens": embedding}, batch)
      return jnp.sum(z_BTV[0] * jnp.cos(jnp.arange(config.vocab_size))[None], -1)

    jacobian_TVD = jax.jacrev(logits_T)(params["embed_tokens"])
    return np.abs(np.asarray(jacobian_TVD)[:, :T]).max(-1) > 0

  t, s = np.arange(T)[:, None], np.arange(T)[None]
  np.testing.assert_array_equal(influence(jnp.ones_like(segments_BT)), s <= t)
  same = np.asarray(segments_BT[0])[:, None] == np.asarray(segments_BT[0])[None]
  np.testing.assert_array_equal(influence(segments_BT), (s <= t) & same)


def test_packed_examples_score_as_alone(tiny):
  """Three examples in one row, in any order, with padding: each one's scores are its own."""
  config, _ = tiny
  params = random_params(config)
  rng = np.random.default_rng(0)
  examples = [rng.integers(0, config.vocab_size, n) for n in (9, 1, 14)]
  alone = [qwen3.score(config, params, batch_of(e[None]), 1.0, 8) for e in examples]
  for order in ((0, 1, 2), (2, 0, 1)):
    lengths = [len(examples[i]) for i in order]
    tokens_BT = np.concatenate([*(examples[i] for i in order), np.zeros(4, int)])[None]
    segments_BT = jnp.asarray(np.repeat([1, 2, 3, 0], [*lengths, 4])[None])
    positions_BT = jnp.asarray(np.concatenate([np.arange(n) for n in (*lengths, 4)])[None])
    packed = qwen3.score(config, params, batch_of(tokens_BT, segments_BT, positions_BT), 1.0, 8)
    for which in (0, 1):
      expected = np.concatenate([*(alone[i][which][0] for i in order), np.zeros(4)])
      np.testing.assert_allclose(packed[which][0], expected, atol=2e-5)
  assert np.abs(expected).max() > 0.1


# --- scores


def by_numpy(z_BTV, tokens_BT, temperature):
  """Log-probabilities and entropies in float64 from logits, aligned at the target."""
  z_BTV = np.asarray(z_BTV, np.float64)[:, :-1] / temperature
  z_BTV -= z_BTV.max(-1, keepdims=True)
  logp_BTV = z_BTV - np.log(np.exp(z_BTV).sum(-1, keepdims=True))
  logp_BT = np.take_along_axis(logp_BTV, np.asarray(tokens_BT)[:, 1:, None], -1)[..., 0]
  entropy_BT = -(np.exp(logp_BTV) * logp_BTV).sum(-1)
  return [np.pad(x, ((0, 0), (1, 0))) for x in (logp_BT, entropy_BT)]


@pytest.mark.parametrize("tied", [True, False])
def test_scores_and_entropy_in_float64(tiny_with, tied):
  """Equal to numpy's from the whole logits, to 1e-12, whatever the chunk; value and gradient."""
  with jax.enable_x64(True):
    config = tiny_with(dtype="float64", tie_word_embeddings=tied)
    params = random_params(config, jnp.float64)
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (2, 11))
    batch = batch_of(tokens_BT)
    logits_BTV = all_logits(config, params, batch)

    @functools.partial(jax.jit, static_argnums=2)
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params, temperature, chunk):
      logp_BT, entropy_BT = qwen3.score(config, params, batch, temperature, chunk)
      wave_BT = jnp.cos(jnp.arange(22.0)).reshape(2, 11)
      return jnp.sum(wave_BT * logp_BT + wave_BT[::-1] * entropy_BT), (logp_BT, entropy_BT)

    for temperature in (0.6, 1.0, 1.7):
      expected = by_numpy(logits_BTV, tokens_BT, temperature)
      assert expected[1].max() > 0.5
      gradients = {}
      for chunk in (64, 11, 3):
        (_, scores), gradients[chunk] = loss(params, temperature, chunk)
        for ours, numpys in zip(scores, expected, strict=True):
          np.testing.assert_allclose(ours, numpys, atol=1e-12)
      whole = qwen3.flatten(gradients.pop(64))
      for chunk, gradient in gradients.items():
        for path, ours in qwen3.flatten(gradient).items():
          scale = np.abs(whole[path]).max()
          assert scale > 1e-3
          name = f"{path}, chunks of {chunk}"
          np.testing.assert_allclose(ours, whole[path], atol=1e-12 * scale, err_msg=name)


def test_unlikely_tokens_keep_their_precision(tiny_with):
  """Predictions of all but one token, log-probabilities below -30: as numpy's, nothing is nan."""
  config = tiny_with()
  params = random_params(config)
  params["norm"] = params["norm"] * 8
  tokens_BT = np.random.default_rng(1).integers(0, config.vocab_size, (1, 40))
  batch = batch_of(tokens_BT)
  logp_BT, entropy_BT = qwen3.score(config, params, batch, 1.0, 16)
  expected = by_numpy(all_logits(config, params, batch), tokens_BT, 1.0)
  assert expected[0].min() < -30
  np.testing.assert_allclose(logp_BT, expected[0], rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(entropy_BT, expected[1], atol=1e-3)


@pytest.mark.parametrize("what", ["value", "gradient"])
def test_scores_of_32k_tokens_hold_no_array_of_tokens_by_vocabulary(what):
  """Compiled for T=32,768 and V=151,936: no array has a sixteenth of T x V elements."""
  T, V = 32_768, 151_936
  config = qwen3.Qwen3Config(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=32,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=16,
    rope_theta=1e6,
    max_position=T,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    dtype="bfloat16",
    remat="layer",
    attention="xla",
  )
  params = jax.eval_shape(lambda: qwen3.init_params(config, jax.random.key(0), jnp.float32))
  batch = jax.eval_shape(lambda: batch_of(jnp.zeros((1, T))))

  def loss(params, batch):
    logp_BT, entropy_BT = qwen3.score(config, params, batch, 0.8, 1024)
    return jnp.sum(batch.weight_BT * logp_BT + 0.01 * entropy_BT)

  function = loss if what == "value" else jax.grad(loss)
  compiled = jax.jit(function).lower(params, batch).compile()
  shapes = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", compiled.as_text())
  largest = max(math.prod(map(int, shape.split(","))) for shape in set(shapes))
  assert 1024 * V <= largest < T * V / 16
  assert compiled.memory_analysis().temp_size_in_bytes < 2 * T * V / 2  # half of [T, V] in bf16


# --- the cache


def with_layers(config, params, numbered: bool):
  """The parameters with layers stacked, or numbered {0: ..., 1: ...}."""
  if not numbered:
    return params
  layers = {
    i: jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(config.num_layers)
  }
  return params | {"layers": layers}


def pages_of(config, rows, length, page, numbered, dtype="float32"):
  """An empty cache for `rows` sequences, their pages in no order among others."""
  each = -(-length // page)
  pages = 1 + rows * each + 2
  order = 1 + np.random.default_rng(7).permutation(pages - 1)[: rows * each]
  cache = kv_cache.create(config, pages, page, dtype, by_layer=numbered)
  return cache, order.reshape(rows, each).astype(np.int32)


extend = jax.jit(qwen3.extend, static_argnums=0)

# What one call computes, as (sequence, first position, tokens) a row; padded to the longest.
SPLITS = {
  "whole prompts": [[(0, 0, 1), (1, 0, 4), (2, 0, 9)]],
  "pieces in one call": [[(2, 0, 3), (2, 3, 3), (2, 6, 3)], [(1, 0, 3), (1, 3, 1), (0, 0, 1)]],
  "pieces over calls": [[(2, 0, 4), (1, 0, 3)], [(1, 3, 1), (2, 4, 4)], [(0, 0, 1), (2, 8, 1)]],
}  # fmt: skip


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kv_heads, page", [(4, 20), (2, 4), (1, 3)])
@pytest.mark.parametrize("numbered", [False, True], ids=["stacked", "numbered layers"])
def test_prefill_and_decode_equal_the_full_forward(tiny_with, kv_heads, page, numbered, split):
  """Prompts of several lengths, computed whole or in pieces, into shuffled pages whose size divides
  nothing, then tokens by ones, twos and threes: the logits of the uncached model everywhere."""
  config = tiny_with(num_kv_heads=kv_heads)
  params = random_params(config)
  B, T = 3, 20
  tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (B, T)).astype(np.int32)
  expected_BTV = np.asarray(all_logits(config, params, batch_of(tokens_BT)))
  cache, table_BP = pages_of(config, B, T, page, numbered)
  layered, found_BTV = with_layers(config, params, numbered), {}

  def call(pieces, cache):
    width = max(n for _, _, n in pieces)
    new_RT = np.full((len(pieces), width), 5, np.int32)
    positions_RT = np.full((len(pieces), width), -1, np.int32)
    for row, (b, first, n) in enumerate(pieces):
      new_RT[row, :n] = tokens_BT[b, first : first + n]
      positions_RT[row, :n] = np.arange(first, first + n)
    table_RP = table_BP[[b for b, _, _ in pieces]]
    on_pages = kv_cache.with_table(cache, table_RP)
    x_RTD, cache = extend(config, layered, new_RT, positions_RT, on_pages)
    logits_RTV = np.asarray(qwen3.logits(config, params, x_RTD))
    for row, (b, first, n) in enumerate(pieces):
      found_BTV.update({(b, first + i): logits_RTV[row, i] for i in range(n)})
    return kv_cache.with_table(cache, None)

  for pieces in SPLITS[split]:
    cache = call(pieces, cache)
  at_B = [1, 4, 9]
  for width in (1, 2, 1, 3, 2, 1, 1):
    cache = call([(b, at_B[b], width) for b in range(B)], cache)
    at_B = [at + width for at in at_B]
  assert sorted(found_BTV) == [(b, t) for b in range(B) for t in range(at_B[b])]
  for (b, t), logits_V in found_BTV.items():
    np.testing.assert_allclose(logits_V, expected_BTV[b, t], atol=2e-5, err_msg=f"row {b} at {t}")
  assert np.abs(expected_BTV).max() > 1


@pytest.mark.parametrize("numbered", [False, True], ids=["stacked", "numbered layers"])
def test_a_shared_prefix_is_computed_once(tiny_with, numbered):
  """Two tables that begin with the same pages: each sequence goes on as if it had computed them."""
  config = tiny_with()
  params = random_params(config)
  rng = np.random.default_rng(3)
  common, ends_BT = rng.integers(0, 64, 8), rng.integers(0, 64, (2, 5))
  tokens_BT = np.concatenate([np.tile(common, (2, 1)), ends_BT], axis=1).astype(np.int32)
  expected_BTV = np.asarray(all_logits(config, params, batch_of(tokens_BT)))
  layered = with_layers(config, params, numbered)
  cache = kv_cache.create(config, 9, 4, "float32", by_layer=numbered)
  table_BP = np.array([[6, 2, 5, 1], [6, 2, 8, 3]], np.int32)
  step_1T = np.arange(13, dtype=np.int32)[None]
  on_pages = kv_cache.with_table(cache, table_BP[:1])
  _, cache = extend(config, layered, tokens_BT[:1, :8], step_1T[:, :8], on_pages)
  positions_BT = np.tile(step_1T[:, 8:], (2, 1))
  on_pages = kv_cache.with_table(cache, table_BP)
  x_BTD, _ = extend(config, layered, tokens_BT[:, 8:], positions_BT, on_pages)
  found_BTV = qwen3.logits(config, params, x_BTD)
  np.testing.assert_allclose(found_BTV, expected_BTV[:, 8:], atol=2e-5)


@pytest.mark.parametrize("dtype, near", [("bfloat16", 0.05), ("int8", 0.1)])
def test_rounded_pages_stay_near_the_full_forward(tiny_with, dtype, near):
  """Log-probabilities over keys and values in half or a quarter of the bytes: close, not equal."""
  config = tiny_with()
  params = qwen3.init_params(config, jax.random.key(0), jnp.float32)
  params["embed_tokens"] = params["embed_tokens"] * 10
  tokens_BT = np.random.default_rng(0).integers(0, 64, (2, 24)).astype(np.int32)
  exact_BTV = jax.nn.log_softmax(all_logits(config, params, batch_of(tokens_BT)))
  cache, table_BP = pages_of(config, 2, 24, 5, numbered=False, dtype=dtype)
  positions_BT = np.tile(np.arange(24, dtype=np.int32), (2, 1))
  on_pages = kv_cache.with_table(cache, table_BP)
  x_BTD, _ = extend(config, params, tokens_BT, positions_BT, on_pages)
  rounded_BTV = jax.nn.log_softmax(qwen3.logits(config, params, x_BTD))
  assert 0 < np.abs(rounded_BTV - exact_BTV).max() < near


# --- how it is computed


def test_remat_changes_memory_only(tiny_with):
  """Every policy gives the loss and the gradients of "none"."""
  tokens_BT = np.random.default_rng(0).integers(0, 64, (2, 24))
  params = random_params(tiny_with())

  def run(remat):
    def loss(params):
      return qwen3.score(tiny_with(remat=remat), params, batch_of(tokens_BT), 1.0, 8)[0].sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    return value, qwen3.flatten(gradient)

  value, gradient = run("none")
  for remat in qwen3.REMAT:
    other, others = run(remat)
    np.testing.assert_allclose(other, value, rtol=1e-6)
    for path, x in gradient.items():
      np.testing.assert_allclose(others[path], x, atol=1e-5 * np.abs(x).max(), err_msg=path)


def kernel_runs(config, params, mesh=None):
  """How often the gradient of a score runs the forward kernel of attention."""
  batch = batch_of(np.random.default_rng(0).integers(0, 64, (2, 24)))

  def loss(params):
    return qwen3.score(config, params, batch, 1.0, 8)[0].sum()

  with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
    return used_kernels(jax.make_jaxpr(jax.grad(loss))(params).jaxpr).count("flash_forward")


def used_kernels(jaxpr) -> list[str]:
  """Names of the kernels in it whose output something reads."""
  read = {id(v) for eqn in jaxpr.eqns for v in eqn.invars} | {id(v) for v in jaxpr.outvars}
  names = []
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "pallas_call" and read & {id(v) for v in eqn.outvars}:
      names.append(eqn.params["name"])
    for inner in jax.tree.leaves(list(eqn.params.values())):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        names += used_kernels(inner)
  return names


@pytest.mark.parametrize("devices", [1, 4])
def test_the_attention_policy_runs_the_kernel_once(tiny_with, devices):
  """Under "layer" the backward pass computes attention again, under "attention" it does not, also
  where the kernel runs inside shard_map."""
  how = {"attention": "pallas_tpu", "head_dim": 64}
  params = random_params(tiny_with(**how))
  mesh = sharding.make_mesh(1, 2, 2, jax.devices()[:4]) if devices > 1 else None
  assert kernel_runs(tiny_with(remat="layer", **how), params, mesh) == 2
  assert kernel_runs(tiny_with(remat="attention", **how), params, mesh) == 1


def test_the_attention_policy_of_the_kernels_gives_the_same_gradients(tiny_with):
  batch = batch_of(np.random.default_rng(0).integers(0, 64, (1, 24)))
  how = {"attention": "pallas_tpu", "head_dim": 64, "num_layers": 2}
  params = random_params(tiny_with(**how))

  def gradient(remat):
    loss = lambda p: qwen3.score(tiny_with(remat=remat, **how), p, batch, 1.0, 8)[0].sum()  # noqa: E731
    return jax.jit(jax.grad(loss))(params)

  got, expected = (qwen3.flatten(gradient(remat)) for remat in ("attention", "layer"))
  for path, x in expected.items():
    np.testing.assert_allclose(got[path], x, atol=1e-5 * np.abs(x).max(), err_msg=path)


def test_policies_keep_less_and_less(tiny_with):
  """Scratch memory of the compiled gradient falls from "none" over "dots" to "layer"."""
  params = random_params(tiny_with(num_layers=6))
  batch = batch_of(np.random.default_rng(0).integers(0, 64, (4, 128)))

  def scratch(remat):
    loss = lambda p: qwen3.score(tiny_with(num_layers=6, remat=remat), p, batch, 1.0, 64)[0].sum()  # noqa: E731
    program = jax.jit(jax.grad(loss)).lower(params).compile()
    return program.memory_analysis().temp_size_in_bytes

  none, dots, layer = map(scratch, ("none", "dots", "layer"))
  assert none > 1.2 * dots and dots > 1.2 * layer


def test_bfloat16_stays_near_float32(tiny_with):
  """Same float32 weights: log-probabilities differ by rounding only, and do differ."""
  params = qwen3.init_params(tiny_with(), jax.random.key(0), jnp.float32)
  params["embed_tokens"] = params["embed_tokens"] * 10
  batch = batch_of(np.random.default_rng(0).integers(0, 64, (4, 64)))
  logp = {}
  for dtype in ("float32", "bfloat16"):
    logp[dtype], entropy_BT = qwen3.score(tiny_with(dtype=dtype), params, batch, 1.0, 32)
    assert logp[dtype].dtype == entropy_BT.dtype == jnp.float32
  difference_BT = np.abs(logp["float32"] - logp["bfloat16"])
  assert 0 < difference_BT.max() < 0.3
  assert difference_BT.mean() < 0.04
  assert np.abs(logp["float32"]).max() > 4


def test_long_rows_in_chunks_of_queries_equal_one_block(monkeypatch, tiny):
  """The chunked attention of long rows gives the values and gradients of the whole one."""
  from qed_kernels.flash_attention import xla

  config, params = tiny
  tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (2, 37))
  segments_BT = jnp.asarray(np.repeat([[1, 2], [1, 0]], [20, 17], axis=1))
  positions_BT = jnp.asarray(np.tile(np.concatenate([np.arange(20), np.arange(17)]), (2, 1)))
  batch = batch_of(tokens_BT, segments_BT, positions_BT)

  def run():
    def loss(params):
      return qwen3.score(config, params, batch, 1.0, 16)[0].sum()

    value, gradient = jax.value_and_grad(loss)(params)
    return value, qwen3.flatten(gradient)

  value, gradient = run()
  monkeypatch.setattr(xla, "QUERY_CHUNK", 8)
  other, others = run()
  np.testing.assert_allclose(other, value, rtol=1e-6)
  for path, x in gradient.items():
    np.testing.assert_allclose(others[path], x, atol=1e-5 * np.abs(x).max(), err_msg=path)
