"""Adapters: no change at first, the chain rule of the full gradient, one device or eight alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_sharding import loss_of, mesh_of, random_batch

from qed_jax import sharding
from qed_jax.model import lora, presets, qwen3
from qed_jax.model.layers import Adapted
from qed_jax.rollout import policy, weights

EVERY = lora.parse(4, 8.0, lora.ALL)


def random_adapter(adapter, config, seed=1, dtype=jnp.float32):
  """Neither factor is zero, and the change is as large as the weights."""
  trained = lora.init_adapter(adapter, config, jax.random.key(seed), dtype)
  keys = iter(jax.random.split(jax.random.key(seed + 1), 100))
  return jax.tree.map(lambda x: 0.3 * jax.random.normal(next(keys), x.shape, dtype), trained)


def scores(config, params, seed=0):
  return jax.jit(lambda params, batch: qwen3.score(config, params, batch, 0.8, 16))(
    params, random_batch(config.vocab_size)
  )


# --- which layers


@pytest.mark.parametrize(
  ("targets", "expected"),
  [
    ("all-linear", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
    ("q_proj,v_proj", "q_proj v_proj"),
    (" v_proj , q_proj ", "q_proj v_proj"),
    ("layers.mlp.up_proj", "up_proj"),
    ("mlp.*", "gate_proj up_proj down_proj"),
    ("?_proj", "q_proj k_proj v_proj o_proj"),
    ("*attn*,down_proj", "q_proj k_proj v_proj o_proj down_proj"),
  ],
)
def test_patterns_name_layers(targets, expected):
  """Ends of paths, as PEFT has them, whole paths and wildcards; the order is the table's."""
  found = lora.parse(4, 8.0, targets).targets
  assert [path.split(".")[-1] for path in found] == expected.split()


@pytest.mark.parametrize(
  ("targets", "said"),
  [
    ("q_poj", "names 'q_poj', which matches no layer: did you mean q_proj"),
    ("q_proj,gate", "names 'gate', which matches no layer: did you mean gate_proj"),
    ("wq*", "matches no layer: use all-linear, or of q_proj, k_proj"),
    ("lm_head", "is not a linear layer of a block"),
    ("embed_tokens", "is not a linear layer of a block"),
    ("*norm", "is not a linear layer of a block"),
    ("Q_PROJ", "matches no layer"),
    ("", "config.lora.targets is empty"),
    (" , ", "config.lora.targets is empty"),
  ],
)
def test_a_pattern_without_a_layer_is_one_line(targets, said):
  with pytest.raises(ValueError) as error:
    lora.parse(4, 8.0, targets)
  assert said in str(error.value) and "\n" not in str(error.value)
  assert lora.parse(0, 8.0, targets) is None


@given(st.text(max_size=20))
def test_any_pattern_gives_layers_or_one_line(targets):
  """Whatever is typed: a non-empty set of real layers, or a ValueError of one line."""
  try:
    assert set(lora.parse(1, 1.0, targets).targets) <= set(lora.TARGETS)
  except ValueError as error:
    assert len(str(error).splitlines()) == 1 and "config.lora.targets" in str(error)


def test_a_rank_that_no_layer_can_have_is_one_line(tiny_with):
  """The largest is the smaller side of the smallest target; a smaller target set allows more."""
  config = tiny_with()  # k_proj is 32 x 32, up_proj 48 x 32, q_proj 64 x 32
  lora.check_rank(lora.parse(32, 1.0, lora.ALL), config)
  with pytest.raises(
    ValueError, match=r"rank is 33, but layers.self_attn.q_proj is \[64, 32\].*32"
  ):
    lora.check_rank(lora.parse(33, 1.0, lora.ALL), config)


def test_the_4b_model_trains_what_the_budget_says():
  """2.064 M parameters a unit of rank over all linear layers (36 x the sum of inputs + outputs)."""
  model = presets.from_preset("qwen3-4b", dtype="bfloat16", remat="layer", attention="auto")
  assert lora.count(lora.parse(16, 32.0, lora.ALL), model) == 16 * 2_064_384
  assert lora.describe(lora.parse(16, 32.0, "*_proj"), model).endswith("33 M parameters (0.82%)")
  attention = (2560 + 4096) * 2 + (2560 + 1024) * 2
  assert lora.count(lora.parse(1, 1.0, "*attn*"), model) == 36 * attention


# --- what is computed


def test_an_adapter_begins_as_no_change_at_all(tiny):
  """Scores with a fresh adapter are those of the base, bit for bit."""
  config, params = tiny
  fresh = lora.init_adapter(EVERY, config, jax.random.key(3), jnp.float32)
  assert float(jnp.abs(qwen3.flatten(fresh)["layers.mlp.up_proj.a"]).max()) > 0
  for ours, base in zip(
    scores(config, lora.attach(params, fresh, EVERY.scale)), scores(config, params), strict=True
  ):
    np.testing.assert_array_equal(ours, base)


def test_unmerged_equals_merged(tiny):
  """w x + scale b (a x) is (w + scale b a) x; the change is not small."""
  config, params = tiny
  adapted = lora.attach(params, random_adapter(EVERY, config), EVERY.scale)
  merged = jax.jit(lambda params: lora.merge(params, jnp.float32))(adapted)
  assert jax.tree.structure(merged) == jax.tree.structure(params)
  ours, theirs, base = (scores(config, p)[0] for p in (adapted, merged, params))
  np.testing.assert_allclose(ours, theirs, atol=2e-5)
  assert np.abs(ours - base).max() > 0.1


def test_merging_rounds_once():
  """In bfloat16 the merged weight is the float32 sum rounded, not a sum of rounded products."""
  w, a, b = (
    jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, 6, 4), (2, 3, 4), (2, 6, 3)])
  )
  w = w.astype(jnp.bfloat16)
  tree = {"layers": {"mlp": {"up_proj": Adapted(w, a, b, 0.01)}}, "norm": jnp.ones(4)}
  merged = lora.merge(tree, jnp.bfloat16)
  exact = np.asarray(w, np.float64) + 0.01 * np.einsum(
    "lor,lri->loi", *(np.asarray(x, np.float64) for x in (b, a))
  )
  up = merged["layers"]["mlp"]["up_proj"]
  assert up.dtype == merged["norm"].dtype == jnp.bfloat16
  spacing = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)
  assert (np.abs(np.asarray(up, np.float64) - exact) <= spacing * 0.5001).all()


def test_gradients_are_the_full_gradients_projections(tiny_with):
  """In float64: d/db = scale dW a^T and d/da = scale b^T dW, dW being that of the merged weight."""
  with jax.enable_x64(True):
    config = tiny_with(dtype="float64", remat="layer")
    params = jax.tree.map(
      lambda x: x.astype(jnp.float64), qwen3.init_params(config, jax.random.key(0), jnp.float32)
    )
    trained = random_adapter(EVERY, config, dtype=jnp.float64)
    batch = random_batch(config.vocab_size)

    def low_rank(trained):
      return loss_of(config, "sft", lora.attach(params, trained, EVERY.scale), batch)

    summed = dict(qwen3.flatten(params))
    changes = qwen3.flatten(trained)
    for path in EVERY.targets:
      (a, b), own = qwen3.adapter_letters(qwen3.DIMS[path]), qwen3.DIMS[path]
      change = jnp.einsum(f"{b},{a}->{own}", changes[path + ".b"], changes[path + ".a"])
      summed[path] = summed[path] + EVERY.scale * change
    value, gradient = jax.jit(jax.value_and_grad(low_rank))(trained)
    whole_value, whole = jax.jit(
      jax.value_and_grad(lambda params: loss_of(config, "sft", params, batch))
    )(qwen3.unflatten(summed))
    np.testing.assert_allclose(value, whole_value, rtol=1e-12)
    gradient, whole = qwen3.flatten(gradient), qwen3.flatten(whole)
    for path in EVERY.targets:
      (a, b), own = qwen3.adapter_letters(qwen3.DIMS[path]), qwen3.DIMS[path]
      db = EVERY.scale * jnp.einsum(f"{own},{a}->{b}", whole[path], changes[path + ".a"])
      da = EVERY.scale * jnp.einsum(f"{own},{b}->{a}", whole[path], changes[path + ".b"])
      for ours, theirs in ((gradient[path + ".b"], db), (gradient[path + ".a"], da)):
        assert float(jnp.abs(theirs).max()) > 1e-6
        np.testing.assert_allclose(
          ours, theirs, rtol=1e-9, atol=1e-12 * float(jnp.abs(theirs).max())
        )


# --- on several devices


def adapted_step(shape, config, dtype="float32"):
  """Loss and gradients of the adapter on a mesh, as numpy."""
  mesh = mesh_of(shape)
  base = policy.abstract_params(config, mesh, "float32")
  own = policy.abstract_adapter(EVERY, config, mesh, "float32")
  params = policy.load_params(policy.Start("random", ""), config, base, seed=0)
  trained = jax.tree.map(
    lambda x, to: jax.device_put(x, to.sharding), random_adapter(EVERY, config), own
  )
  with jax.set_mesh(mesh):
    run = jax.value_and_grad(
      lambda trained, params, batch: loss_of(
        config, "rl", lora.attach(params, trained, EVERY.scale), batch
      )
    )
    batch = sharding.put(mesh, random_batch(config.vocab_size), "BT")
    value, gradient = jax.jit(run)(trained, params, batch)
  return float(value), qwen3.flatten(jax.device_get(gradient)), trained


def test_eight_devices_equal_one(tiny_with):
  """Loss and gradients to 1e-5 over fsdp x tensor x sequence; the factors are split as weights."""
  shape = (1, 2, 2, 2)
  config = tiny_with(remat="layer")
  value, gradient, _ = adapted_step((1, 1, 1), config)
  other, others, trained = adapted_step(shape, config)
  np.testing.assert_allclose(other, value, rtol=1e-5)
  for path, x in gradient.items():
    np.testing.assert_allclose(others[path], x, atol=1e-5 * np.abs(x).max(), err_msg=path)
  up = qwen3.flatten(trained)["layers.mlp.up_proj.a"]
  assert up.addressable_shards[0].data.size * 4 == up.size  # its inputs, over fsdp and sequence


# --- in the sampler


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_sampler_runs_the_adapter_as_the_trainer_does(tiny_with, dtype):
  """Hidden states of the sampler's own layout, an array a layer, are the trainer's."""
  config = tiny_with(dtype=dtype, tie_word_embeddings=False)
  params = qwen3.init_params(config, jax.random.key(5), jnp.dtype(dtype))
  adapted = lora.attach(params, random_adapter(EVERY, config), EVERY.scale)
  weights.check(config, adapted)
  mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
  [own] = weights.sampler_params(config, adapted, mesh)
  batch = random_batch(config.vocab_size)

  @jax.jit
  def ours(own):
    view_config, view = weights.model_view(config, own)
    return qwen3.score(view_config, view, batch, 0.8, 16)[0]

  atol = {"float32": 1e-5, "bfloat16": 0.15}[dtype]
  np.testing.assert_allclose(ours(own), scores(config, adapted)[0], atol=atol)


def test_the_samplers_replicas_hold_their_share_of_the_adapter(tiny_with):
  """Heads and MLP over tensor; the width whole; values as the trainer's."""
  shape = (2, 2, 2)
  config = tiny_with(num_heads=8, num_kv_heads=8)
  params = qwen3.init_params(config, jax.random.key(4), jnp.float32)
  adapted = lora.attach(params, random_adapter(EVERY, config), EVERY.scale)
  own = weights.sampler_params(config, adapted, sharding.make_mesh(*shape))
  assert len(own) == shape[0] * shape[1]
  q = own[-1]["layers"][1]["self_attn"]["q_proj"]
  expected = qwen3.flatten(adapted)["layers.self_attn.q_proj"]
  np.testing.assert_array_equal(q.a, expected.a[1])
  np.testing.assert_array_equal(q.b, expected.b[1])
  assert q.b.addressable_shards[0].data.size * shape[2] == q.b.size
