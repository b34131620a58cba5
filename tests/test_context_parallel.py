"""Rows whose tokens are split over devices: the single device's result, less of it on each."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qed_kernels.flash_attention import xla

from qed_jax import sharding
from qed_jax.model import attention, context_parallel, qwen3
from qed_jax.records import Batch
from qed_jax.rollout import policy

# data, fsdp, tensor, sequence; key heads (of 8 query heads); what has to come of them.
CASES = [
  ((1, 1, 1, 2), 2, "heads"),
  ((1, 2, 2, 2), 4, "heads"),
  ((1, 1, 1, 8), 8, "heads"),
  ((1, 2, 1, 4), 2, "tokens"),
  ((1, 1, 2, 4), 4, "tokens"),
  ((1, 1, 1, 8), 1, "tokens"),
]


def mesh_of(data, fsdp, tensor, sequence):
  devices = jax.devices()[: data * fsdp * tensor * sequence]
  return sharding.make_mesh(data, fsdp, tensor, devices, sequence=sequence)


def sizes(key_heads: int, **changes) -> qwen3.Qwen3Config:
  config = qwen3.Qwen3Config(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=8,
    num_kv_heads=key_heads, head_dim=64, rope_theta=1e4, max_position=4096, rms_norm_eps=1e-6,
    tie_word_embeddings=True, dtype="float32", remat="layer", attention="xla",
  )  # fmt: skip
  return dataclasses.replace(config, **changes)


def packed(rows: int, T: int) -> Batch:
  """Rows of three segments and a tail of padding."""
  rng = np.random.default_rng(0)
  segments_BT = np.sort(rng.integers(1, 4, (rows, T)), axis=1)
  segments_BT[:, -(T // 16) :] = 0
  position_BT = np.tile(np.arange(T), (rows, 1))
  arrays = (rng.integers(0, 64, (rows, T)), position_BT, segments_BT)
  return Batch(*(x.astype(np.int32) for x in arrays), rng.normal(size=(rows, T)).astype("float32"))


def loss(config, params, batch):
  logp_BT, entropy_BT = qwen3.score(config, params, batch, 0.8, 48)
  return jnp.mean(batch.weight_BT * logp_BT + entropy_BT)


@functools.cache
def one_device(config, rows: int, T: int):
  params = qwen3.init_params(config, jax.random.key(0), jnp.float32)
  return jax.jit(jax.value_and_grad(functools.partial(loss, config)))(params, packed(rows, T))


def on_mesh(shape, config, rows: int, T: int):
  """Loss and gradients, everything laid out as the trainer does."""
  mesh = mesh_of(*shape)
  with jax.set_mesh(mesh):
    layout = jax.tree.map(lambda x: x.sharding, policy.abstract_params(config, mesh, "float32"))
    params = jax.device_put(qwen3.init_params(config, jax.random.key(0), jnp.float32), layout)
    step = jax.jit(
      jax.value_and_grad(functools.partial(loss, config)), out_shardings=(None, layout)
    )
    return step(params, sharding.put(mesh, packed(rows, T), "BT"))


def assert_same(found, wanted) -> None:
  """To 1e-5 of an array's largest entry."""
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=0, atol=1e-5 * np.abs(y).max())


@pytest.mark.parametrize("name", ["xla", "pallas_tpu"])  # the latter in its interpreter
@pytest.mark.parametrize(("shape", "key_heads", "way"), CASES, ids=str)
def test_rows_split_by_tokens_train_as_whole_ones(shape, key_heads, way, name):
  """Loss and gradients of packed rows with padding, forward and backward, both ways."""
  config = sizes(key_heads, attention=name)
  with jax.set_mesh(mesh_of(*shape)):
    assert attention.way(config, 160) == way
  assert_same(on_mesh(shape, config, 2, 160), one_device(sizes(key_heads), 2, 160))


@pytest.mark.parametrize(
  ("T", "key_heads", "name"),
  [(162, 4, "pallas_tpu"), (164, 1, "xla"), (164, 2, "pallas_tpu"), (160, 1, "xla")],
)
def test_what_does_not_divide_stays_whole_and_right(T, key_heads, name):
  """Tokens that the devices do not divide, shares without halves, key heads that tensor does not
  divide: no exchange is possible, and the result is the same."""
  shape = (1, 1, 2, 4)
  config = sizes(key_heads, attention=name)
  with jax.set_mesh(mesh_of(*shape)):
    assert attention.way(config, T) == "whole"
  assert_same(on_mesh(shape, config, 2, T), one_device(sizes(key_heads), 2, T))


def collectives(text: str) -> list[tuple[str, list[int]]]:
  """(operation, elements of each of its results) of a compiled program."""
  found = re.findall(r"= (.+?) (all-\S+|reduce-scatter|collective-permute)(?:-start)?\(", text)
  return [
    (name, [math.prod(map(int, filter(None, dims.split(",")))) for dims in DIMS.findall(shapes)])
    for shapes, name in found
  ]


DIMS = re.compile(r"\w+\[([\d,]*)\]")


@pytest.mark.parametrize(("shape", "key_heads", "way"), CASES, ids=str)
def test_the_bytes_that_are_counted_are_those_of_the_program(shape, key_heads, way):
  """What a device receives in the compiled attention of a layer is what `bytes_received` says."""
  T, shares = 160, shape[3]
  config, mesh = sizes(key_heads), mesh_of(*shape)
  with jax.set_mesh(mesh):
    rows = jax.jit(functools.partial(attention.pack, config))(packed(2, T).segments_BT)
    made = [
      jax.ShapeDtypeStruct(
        (2, T, heads, 64),
        jnp.float32,
        sharding=jax.NamedSharding(mesh, attention.layout("BTNH", (2, T, heads, 64))),
      )
      for heads in (8, key_heads, key_heads)
    ]
    program = jax.jit(functools.partial(attention.attention, config)).lower(*made, rows).compile()
  received = 0
  for name, elements in collectives(program.as_text()):
    kept = 0 if name == "collective-permute" else 1
    received += 4 * sum(elements) * (shares - kept) // shares
  q_bytes, k_bytes = (
    4 * x.sharding.shard_shape(x.shape)[2] * x.size // x.shape[2] for x in made[:2]
  )
  rows_and_tokens = shape[0] * shape[1] * shares
  counted = context_parallel.bytes_received(
    q_bytes // rows_and_tokens, k_bytes // rows_and_tokens, shares
  )
  assert received == counted[way]


def test_the_way_with_fewer_bytes_is_taken():
  """All-to-all, unless a key head has so many query heads that moving those costs more."""
  assert context_parallel.bytes_received(32, 8, 4) == {"heads": 60, "tokens": 80}
  with jax.set_mesh(mesh_of(1, 1, 1, 4)):
    assert attention.way(sizes(8, num_heads=32), 160) == "heads"
    assert attention.way(sizes(4, num_heads=64), 160) == "tokens"
    assert attention.way(sizes(4, num_heads=64), 164) == "heads"  # a share has no halves


@pytest.mark.slow
def test_a_chip_holds_less_and_no_collective_moves_the_residual_stream(monkeypatch):
  """Scratch memory of a device falls with `sequence`, for either way; what is exchanged is smaller
  than the [T, D] of a row."""
  monkeypatch.setattr(xla, "QUERY_CHUNK", 8)  # or its scores are most of the memory
  T = 2048
  scratch = {}
  for key_heads in (8, 1):
    config = sizes(key_heads, head_dim=8)
    for sequence in (1, 2, 4, 8):
      mesh = mesh_of(1, 1, 1, sequence)
      with jax.set_mesh(mesh):
        params = policy.abstract_params(config, mesh, "float32")
        batch = sharding.put(mesh, packed(1, T), "BT")
        step = jax.jit(jax.grad(functools.partial(loss, config)))
        program = step.lower(params, batch).compile()
      scratch[key_heads, sequence] = program.memory_analysis().temp_size_in_bytes
      exchanged = [size for _, sizes in collectives(program.as_text()) for size in sizes]
      assert sequence == 1 or max(exchanged) <= T * config.hidden_size // 2
  for key_heads in (8, 1):
    of = [scratch[key_heads, sequence] for sequence in (1, 2, 4, 8)]
    assert all(after < 0.8 * before for before, after in zip(of, of[1:], strict=False)), scratch
