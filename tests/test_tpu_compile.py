"""What the real TPU compiler makes of the kernels and of whole steps, with no TPU: `make aot`.

libtpu compiles for chips that are not there. What it refuses here it refuses on a pod: blocks that
no tile fits, more VMEM than a core has. What it plans here is what runs there: buffers, aliases.
"""

import dataclasses
import functools
import importlib.util
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from qed_kernels import flash_attention as fa
from qed_kernels.flash_attention.shapes import REAL

from qed_jax import sharding
from qed_jax.model import head, kv_cache, presets, qwen3
from qed_jax.records import Batch
from qed_jax.rollout import policy, sampler, sampling
from qed_jax.sharding import AXES

pytestmark = [
  pytest.mark.aot,
  pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU compiler, is not installed: `make aot` installs it and runs these",
  ),
]

# Of libtpu, which otherwise asks a cloud's metadata server what machine this is.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
os.environ.setdefault("TPU_LOG_DIR", "disabled")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

ONE_CHIP = {"v5e": "v5e:1x1", "v5p": "v5p:2x2x1", "v6e": "v6e:1x1"}
KERNELS = ("flash_forward", "flash_backward", "paged_decode", "score_forward", "score_backward")
HBM = {"v5e": 16 << 30, "v5p": 95 << 30, "v6e": 32 << 30}


@functools.cache
def devices(topology: str):
  how = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
  return topologies.get_topology_desc(platform="tpu", topology_name=topology, **how).devices


def mesh(topology: str, tensor: int = 1) -> Mesh:
  return Mesh(np.array(devices(topology)[:tensor]).reshape(1, 1, 1, tensor), AXES)


def compiled(on: Mesh, program, *arguments, donate=()):
  """The program for these chips; arguments are abstract and replicated unless laid out already."""
  place = lambda x: x if x.sharding else abstract(on, x.shape, x.dtype)  # noqa: E731
  with jax.set_mesh(on), jax.sharding.use_abstract_mesh(on.abstract_mesh):
    lowered = jax.jit(program, donate_argnums=donate).lower(*jax.tree.map(place, arguments))
    return lowered.compile()


def abstract(on: Mesh, shape, dtype, *axes) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(on, P(*axes)))


def kernels_of(program) -> set[str]:
  """Names of the Pallas kernels in a compiled program."""
  calls = re.findall(r"%(\S+) = [^\n]*custom_call_target=\"tpu_custom_call\"", program.as_text())
  return {name for name in KERNELS if name in str(calls)}


CASES = [
  ("v5e", "sft 4k"), ("v6e", "sft 4k"), ("v5p", "sft 4k"), ("v5e", "smoke 0.6B"),
  ("v6e", "packed 16k"), ("v5p", "rollout 49k"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_compilation_cache():
  """jax writes programs for these chips to it and cannot read them back."""
  before = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", None)
  yield
  jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(("chip", "name"), CASES)
def test_flash_attention_compiles_for_real_shapes(chip, name):
  """Forward and backward, packed: the kernels are in the program, and it fits."""
  on, shape = mesh(ONE_CHIP[chip]), REAL[name]
  B, T, N, K, H = shape.B, shape.T, shape.N, shape.K, shape.H

  def both(q, k, v, segments_BT, do):
    rows = fa.pack(segments_BT, N, K, H)
    attend = lambda *qkv: fa.flash_attention(*qkv, rows)[0]  # noqa: E731
    o, pull = jax.vjp(attend, q, k, v)
    return o, pull(do)

  of = lambda *size: abstract(on, size, jnp.bfloat16)  # noqa: E731
  segments_BT = abstract(on, (B, T), jnp.int32)
  program = compiled(
    on, both, of(B, T, N, H), of(B, T, K, H), of(B, T, K, H), segments_BT, of(B, T, N, H)
  )
  assert kernels_of(program) == {"flash_forward", "flash_backward"}
  memory = program.memory_analysis()
  assert memory.temp_size_in_bytes + memory.argument_size_in_bytes < HBM[chip] / 2


@pytest.mark.parametrize("chip", ONE_CHIP)
def test_a_row_of_128k_tokens_compiles(chip):
  """Its list of tiles fits into scalar memory. Forward only: the 16 backward calls have shorter
  lists, and take two minutes to compile."""
  on, (T, N, K, H) = mesh(ONE_CHIP[chip]), (131_072, 32, 8, 128)
  attend = lambda q, k, v, segments: fa.flash_attention(q, k, v, fa.pack(segments, N, K, H))  # noqa: E731
  of = lambda heads: abstract(on, (1, T, heads, H), jnp.bfloat16)  # noqa: E731
  program = compiled(on, attend, of(N), of(K), of(K), abstract(on, (1, T), jnp.int32))
  assert kernels_of(program) == {"flash_forward"}


@pytest.mark.parametrize(
  ("chip", "fsdp", "mebibytes"),
  [("v5e:1x1", 1, 1000), ("v5p:2x2x1", 1, 1000), ("v6e:1x1", 1, 1000), ("v5e:2x4", 8, 3000)],
)
def test_the_4b_head_keeps_its_logits_in_vmem(chip, fsdp, mebibytes):
  """Scores of 32k tokens a chip, forward and backward: what is set aside is the head in bfloat16,
  on a mesh also its gradient before it is split; the logits alone would be 19,000 MiB."""
  on = Mesh(np.array(devices(chip)[:fsdp]).reshape(1, fsdp, 1, 1), AXES)
  T, D, V = 32768, 2560, 151936

  def both(x_BTD, w_VD, target_BT, *cotangents):
    scores = lambda x, w: head.score_tokens(x, w, target_BT, 0.8, 1024, False)  # noqa: E731
    out, pull = jax.vjp(scores, x_BTD, w_VD)
    return out, pull(cotangents)

  rows = lambda *size, dtype=jnp.float32: abstract(on, (fsdp, *size), dtype, "fsdp")  # noqa: E731
  arguments = (
    rows(T, D, dtype=jnp.bfloat16),
    abstract(on, (V, D), jnp.float32, None, "fsdp"),
    rows(T, dtype=jnp.int32),
    rows(T),
    rows(T),
  )
  program = compiled(on, both, *arguments)
  assert kernels_of(program) == {"score_forward", "score_backward"}
  assert program.memory_analysis().temp_size_in_bytes < mebibytes << 20


@pytest.mark.parametrize("chip", ONE_CHIP)
def test_a_frozen_4b_head_sets_nothing_aside(chip):
  """Beside an adapter: no array for the head's gradient, 1,484 MiB, and no copy of the head."""
  on = mesh(ONE_CHIP[chip])
  T, D, V = 8192, 2560, 151936

  def tokens_only(x_BTD, w_VD, target_BT, *cotangents):
    score = lambda x: head.score_tokens(x, w_VD, target_BT, 0.8, 1024, True)  # noqa: E731
    out, pull = jax.vjp(score, x_BTD)
    return out, pull(cotangents)

  of = lambda dtype, *size: abstract(on, size, dtype)  # noqa: E731
  row, x, w = of(jnp.float32, 1, T), of(jnp.bfloat16, 1, T, D), of(jnp.bfloat16, V, D)
  program = compiled(on, tokens_only, x, w, of(jnp.int32, 1, T), row, row)
  assert kernels_of(program) == {"score_forward", "score_backward"}
  assert program.memory_analysis().temp_size_in_bytes < 200 << 20


@pytest.mark.parametrize(
  ("chip", "tensor", "kv_dtype", "T"),
  [
    ("v5e:2x4", 8, "bfloat16", 1), ("v5p:2x2x1", 1, "bfloat16", 1), ("v6e:1x1", 1, "bfloat16", 1),
    ("v5e:2x4", 4, "int8", 1), ("v6e:1x1", 1, "int8", 1), ("v5e:2x4", 8, "bfloat16", 4),
  ],
)  # fmt: skip
def test_the_4b_decode_step_keeps_its_cache_in_place(chip, tensor, kv_dtype, T):
  """36 layers over 16 sequences: the kernel runs, the pages are written where they are, and beside
  activations and logits nothing is set aside: no slice of the cache, no copy of a weight."""
  on = mesh(chip, tensor)
  config = presets.from_preset("qwen3-4b", dtype="bfloat16", remat="none", attention="auto")
  B, page, width = 16, 256, 16
  weights = qwen3.unflatten(
    {
      path: abstract(on, shape, jnp.bfloat16, *layout(qwen3.DIMS[path]))
      for path, shape in qwen3.shapes(config).items()
    }
  )
  pool = jax.eval_shape(
    lambda: kv_cache.create(config, 1 + B * width, page, kv_dtype, by_layer=False)
  )
  cache = jax.tree.map(lambda x: abstract(on, x.shape, x.dtype, None, None, "tensor"), pool)

  def step(params, cache, tokens_BT, positions_BT, table_BP):
    on_pages = kv_cache.with_table(cache, table_BP)
    x_BTD, cache = qwen3.extend(config, params, tokens_BT, positions_BT, on_pages)
    return x_BTD, kv_cache.lay_out(kv_cache.with_table(cache, None))

  ints = lambda *size: abstract(on, size, jnp.int32)  # noqa: E731
  program = compiled(on, step, weights, cache, ints(B, T), ints(B, T), ints(B, width), donate=1)
  assert kernels_of(program) == {"paged_decode"}
  memory = program.memory_analysis()
  cache_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pool)) // tensor
  assert memory.alias_size_in_bytes >= cache_bytes
  assert memory.temp_size_in_bytes < 24 << 20


@pytest.mark.parametrize("topology", ["v5e:2x4", "v5e:4x4", "v6e:2x4", "v5p:2x2x1"])
@pytest.mark.parametrize("tensor", [2, 4])
def test_replicas_have_devices_in_the_order_of_their_weights(topology, tensor):
  """jax orders a mesh's devices by where they are on a TPU; weights arrive device by device."""
  training = sharding.make_mesh(1, -1, tensor, list(devices(topology)))
  rows = sharding.side_by_side(training).devices.reshape(-1, tensor).tolist()
  assert [m.devices.ravel().tolist() for m in sharding.replica_meshes(training)] == rows


def layout(dims: str):
  """Heads, hidden units and vocabulary over `tensor`, as the sampler has them."""
  return ["tensor" if letter in "NKFV" else None for letter in dims]


@pytest.mark.parametrize("tensor", [1, 4])
def test_a_chunk_of_sampling_compiles(tensor):
  """The engine's whole decode loop, 0.6B: the kernel in it, its state donated, no copy of pages."""
  on = mesh("v5e:2x4", tensor)
  config = presets.from_preset("qwen3-0.6b", dtype="bfloat16", remat="none", attention="auto")
  slots, page, width = 16, 256, 16
  with jax.set_mesh(on):
    state = jax.eval_shape(
      lambda: sampler.SamplingState(
        kv_cache=kv_cache.create(config, 1 + slots * width, page, "bfloat16", by_layer=False),
        **dict.fromkeys(("token_B", "position_B", "remaining_B"), jnp.zeros(slots, jnp.int32)),
        key_B=sampling.attempt_keys(*[jnp.zeros(slots, jnp.uint32)] * 3),
        stop_BS=jnp.zeros((slots, sampler.MAX_STOP_IDS), jnp.int32),
        controls=jax.tree.map(jnp.asarray, sampling.neutral(slots)),
        history=sampling.empty_history(slots, config.vocab_size),
      )
    )
  heads, rows = (None, None, "tensor"), (None, "tensor")
  place = lambda tree, *axes: jax.tree.map(lambda x: abstract(on, x.shape, x.dtype, *axes), tree)  # noqa: E731
  state = dataclasses.replace(
    place(state),
    kv_cache=place(state.kv_cache, *heads),
    history=place(state.history, *rows),
  )
  weights = qwen3.unflatten(
    {
      path: abstract(on, shape, jnp.bfloat16, *layout(qwen3.DIMS[path]))
      for path, shape in qwen3.shapes(config).items()
    }
  )
  how = {"chunk": 64, "truncated_logp": False}

  def decode(*arguments):
    return sampler.decode.__wrapped__(config, *arguments, **how)

  ints = lambda *size: abstract(on, size, jnp.int32)  # noqa: E731
  program = compiled(on, decode, weights, state, ints(slots, width), ints(), donate=1)
  assert kernels_of(program) == {"paged_decode"}
  memory, pages = program.memory_analysis(), jax.tree.leaves(state.kv_cache)
  cache_bytes = sum(x.size * x.dtype.itemsize for x in pages) // tensor
  assert memory.alias_size_in_bytes >= cache_bytes > 4 * memory.temp_size_in_bytes


def test_a_row_of_53k_tokens_trains_on_eight_small_chips():
  """Qwen3-4B on v5e chips of 16 GB: gradients with their tokens over all eight, and AdamW beside
  them, fit."""
  T, chips = 53_248, 8
  on = Mesh(np.array(devices("v5e:2x4")).reshape(1, 1, chips, 1), AXES)
  config = presets.from_preset("qwen3-4b", dtype="bfloat16", remat="layer", attention="auto")

  def loss(params, batch):
    return jnp.sum(qwen3.score(config, params, batch, 1.0, 1024)[0] * batch.weight_BT)

  params = policy.abstract_params(config, on, "float32")
  row = lambda dtype: abstract(on, (1, T), dtype, None, "sequence")  # noqa: E731
  program = compiled(on, jax.grad(loss), params, Batch(*map(row, ["int32"] * 3 + ["float32"])))
  assert kernels_of(program) == set(KERNELS) - {"paged_decode"}
  memory = program.memory_analysis()
  # Weights, gradients and the two moments are of one size.
  assert memory.temp_size_in_bytes + 4 * memory.argument_size_in_bytes < HBM["v5e"]
  assert memory.output_size_in_bytes < 1.1 * memory.argument_size_in_bytes
