"""Eight devices compute what one does, and the rule tables say what the design says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from qed_jax import optim, sharding, train
from qed_jax.model import qwen3
from qed_jax.objectives import policy_gradient, sft
from qed_jax.records import Batch
from qed_jax.rollout import policy

ONE = (1, 1, 1)
MESHES = [(1, 8, 1), (1, 4, 2), (2, 2, 2), (1, 1, 2, 4), (1, 2, 1, 4)]  # the fourth is sequence
B, T = 8, 32


def mesh_of(shape):
  data, fsdp, tensor, sequence = (*shape, 1)[:4]
  devices = jax.devices()[: int(np.prod(shape))]
  return sharding.make_mesh(data, fsdp, tensor, devices, sequence=sequence)


def random_batch(vocab: int) -> Batch:
  """Packed rows with two segments and some padding, everything a policy gradient reads."""
  rng = np.random.default_rng(0)
  segments = np.tile(np.repeat([1, 2, 0], [12, 16, 4]), (B, 1))
  positions = np.tile(np.r_[np.arange(12), np.arange(16), np.zeros(4)], (B, 1))
  trained = (segments > 0) & (positions > 3)
  return Batch(
    tokens_BT=rng.integers(0, vocab, (B, T)).astype(np.int32),
    positions_BT=positions.astype(np.int32),
    segments_BT=segments.astype(np.int32),
    weight_BT=(trained / trained.sum()).astype(np.float32),
    advantage_BT=rng.normal(size=(B, T)).astype(np.float32),
    behavior_logp_BT=-rng.uniform(3, 5, (B, T)).astype(np.float32),
  )


def loss_of(config, kind, params, batch):
  logp_BT, entropy_BT = qwen3.score(config, params, batch, 0.8, 16)
  if kind == "sft":
    return sft.loss(logp_BT, entropy_BT, batch)[0]
  return policy_gradient.loss(
    logp_BT, entropy_BT, batch, policy_loss="ppo", eps_low=4.0, eps_high=4.0, kl_coef=0.0,
    entropy_coef=1e-2, clamp_log_ratio=5.0,
  )[0]  # fmt: skip


def step_on(shape, config, kind):
  """Loss, gradients and AdamW-updated parameters of one batch on a mesh, as numpy."""
  mesh = mesh_of(shape)
  optimizer = optax.adamw(1e-3)
  with jax.set_mesh(mesh):
    abstract = policy.abstract_params(config, mesh, "float32")
    layout = jax.tree.map(lambda x: x.sharding, abstract)
    params = policy.load_params(policy.Start("random", ""), config, abstract, seed=0)
    batch = sharding.put(mesh, random_batch(config.vocab_size), "BT")

    @functools.partial(jax.jit, out_shardings=(None, layout, layout))
    def step(params, batch):
      loss, grads = jax.value_and_grad(functools.partial(loss_of, config, kind))(params, batch)
      updates, _ = optimizer.update(grads, optimizer.init(params), params)
      return loss, grads, optax.apply_updates(params, updates)

    with jax.transfer_guard("disallow"):
      result = step(params, batch)
    return jax.device_get(result)


@pytest.fixture(scope="module")
def wide(tiny_with):
  """Sizes that eight devices divide, an untied head, remat on."""
  return tiny_with(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_heads=8, num_kv_heads=4, head_dim=8,
    tie_word_embeddings=False, remat="layer",
  )  # fmt: skip


@pytest.mark.parametrize("kind", ["sft", "policy_gradient"])
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_eight_devices_equal_one(shape, kind, wide):
  """Loss, gradients and updated weights, fp32, to 1e-5."""
  expected, got = step_on(ONE, wide, kind), step_on(shape, wide, kind)
  for name, a, b in zip(("loss", "gradients", "weights"), expected, got, strict=True):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
      np.testing.assert_allclose(x, y, rtol=0, atol=1e-5, err_msg=name)


def test_weights_are_split_where_the_table_says(wide):
  """On fsdp=4 x tensor=2 a q_proj shard has D / 4 and N / 2."""
  mesh = mesh_of((1, 4, 2))
  abstract = qwen3.flatten(policy.abstract_params(wide, mesh, "float32"))
  q_proj = abstract["layers.self_attn.q_proj"]
  assert q_proj.sharding.spec == P(None, "tensor", None, "fsdp")
  assert q_proj.sharding.shard_shape(q_proj.shape) == (2, 4, 8, 16)
  for path, leaf in abstract.items():
    pieces = np.prod(leaf.shape) / np.prod(leaf.sharding.shard_shape(leaf.shape))
    assert pieces >= (2 if "norm" not in path else 1), path


def test_the_sequence_is_sharded_between_the_blocks_and_heads_inside():
  mesh = mesh_of((2, 2, 2))
  spec = functools.partial(sharding.spec, sharding.ACTIVATIONS, mesh=mesh)
  assert spec("BTD", (8, 32, 64)) == P(("data", "fsdp"), "tensor", None)
  assert spec("BTNH", (8, 32, 8, 16)) == P(("data", "fsdp"), None, "tensor", None)
  assert spec("BCV", (8, 16, 64)) == P(("data", "fsdp"), None, "tensor")


def test_tokens_are_split_over_sequence_everywhere_and_weights_too():
  mesh = mesh_of((1, 2, 2, 2))
  spec = functools.partial(sharding.spec, sharding.ACTIVATIONS, mesh=mesh)
  assert spec("BTD", (8, 32, 64)) == P("fsdp", ("sequence", "tensor"), None)
  assert spec("BTNH", (8, 32, 8, 16)) == P("fsdp", "sequence", "tensor", None)
  assert spec("BTD", (8, 33, 64)) == P("fsdp", None, None)
  assert sharding.spec(sharding.WEIGHTS, "FD", (96, 64), mesh) == P("tensor", ("fsdp", "sequence"))


def test_engines_use_devices_of_a_row_as_replicas():
  """Sampling has a replica for each row of `tensor`, whatever the other axes are for."""
  mesh = mesh_of((1, 2, 2, 2))
  replicas = sharding.replica_meshes(mesh)
  assert [r.shape["tensor"] for r in replicas] == [2] * 4
  together = sharding.side_by_side(mesh)
  assert together.shape["tensor"] == 2 and together.shape["sequence"] == 1
  order = lambda mesh: [device.id for device in mesh.devices.flat]  # noqa: E731
  assert sum(map(order, replicas), []) == order(mesh) == order(together)


def test_a_dimension_that_its_axes_do_not_divide_stays_whole():
  mesh = mesh_of((1, 4, 2))
  assert sharding.spec(sharding.WEIGHTS, "KHD", (3, 16, 6), mesh) == P(None, None, None)


def test_a_mesh_of_another_size_is_refused_in_one_line():
  with pytest.raises(ValueError, match="needs 6 devices, this run has 8") as error:
    sharding.make_mesh(1, 3, 2)
  assert "\n" not in str(error.value)
  assert dict(sharding.make_mesh(1, -1, 2).shape) == {
    "data": 1, "fsdp": 4, "sequence": 1, "tensor": 2,
  }  # fmt: skip
  with pytest.raises(ValueError, match="fsdp=1 x sequence=3 x tensor=2 needs 6 devices"):
    sharding.make_mesh(1, -1, 2, sequence=3)


def test_the_compiled_step_shards_the_residual_stream(wide):
  """The saved layer inputs, which remat keeps, are [B / 4, T / 2, D] a device on this mesh."""
  mesh = mesh_of((1, 4, 2))
  with jax.set_mesh(mesh):
    abstract = policy.abstract_params(wide, mesh, "float32")
    batch = sharding.put(mesh, random_batch(wide.vocab_size), "BT")
    grad = jax.jit(jax.grad(functools.partial(loss_of, wide, "sft")))
    text = grad.lower(abstract, batch).compile().as_text()
  layers, hidden = wide.num_layers, wide.hidden_size
  assert f"f32[{layers},{B // 4},{T // 2},{hidden}]" in text
  assert f"f32[{layers},{B},{T},{hidden}]" not in text


def test_optimizer_moments_lie_where_their_parameters_do(wide):
  mesh = mesh_of((1, 4, 2))
  optimizer = optim.make_optimizer(
    peak_lr=1e-3, schedule="constant", warmup_steps=0, total_steps=9, b1=0.9, b2=0.99, eps=1e-8,
    weight_decay=0.1, clip_norm=1.0, decay_norms=False, mu_dtype="float32",
    second_moment="float32",
  )  # fmt: skip
  state = train.abstract_state(wide, optimizer, mesh, "bfloat16")
  moments = [x for x in jax.tree.leaves(state["opt_state"]) if x.ndim]
  expected = [x.sharding for x in jax.tree.leaves(state["params"])]
  assert [x.sharding for x in moments] == expected * 2
  assert {x.dtype.name for x in moments} == {"float32"}
  counts = [x for x in jax.tree.leaves(state["opt_state"]) if not x.ndim]
  assert all(x.sharding.is_fully_replicated for x in counts)


def test_outside_a_mesh_nothing_is_pinned():
  x = jnp.ones((2, 3, 4))
  assert sharding.constrain(x, "BTD") is x


def test_batches_keep_their_fields(wide):
  """put lays out every array of a Batch and leaves None alone."""
  batch = dataclasses.replace(random_batch(8), advantage_BT=None)
  placed = sharding.put(mesh_of((2, 2, 2)), batch, "BT")
  assert placed.advantage_BT is None
  assert placed.tokens_BT.sharding.shard_shape((B, T)) == (B // 4, T // 2)
