"""A config's own programs, compiled by libtpu for a topology that is not there: what plan.py asks.

The training step is train.make_update on train.abstract_state; prefill and decode are those of
rollout/sampler.py; nothing is written again here.
"""

import dataclasses
import importlib.util
import os
import re
import time

# Of libtpu, which otherwise asks a cloud's metadata server what machine this is.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
os.environ.setdefault("TPU_LOG_DIR", "disabled")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding

from qed_jax import optim, sharding, train
from qed_jax.model import lora
from qed_jax.planning import collectives, memory
from qed_jax.planning.chips import GIB, Topology
from qed_jax.records import Batch
from qed_jax.rollout import policy, sampler, weights

# What libtpu says of a program that does not fit, its need first.
REFUSAL = re.compile(
  r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm"
  r"|\(([\d.]+)([KMG])\) exceeds available HBM \([\d.]+[KMG]\)"
)
UNIT = {"K": 1 << 10, "M": 1 << 20, "G": GIB}


@dataclasses.dataclass(frozen=True)
class Compiled:
  """Bytes on a chip. host: in the host's memory. sent: bytes that a chip sends, by mesh axes.

  refused: the compiler's line where the program alone is too large; temporaries are then all that
  it says it needs, arguments among them.
  """

  arguments: float
  temporaries: float
  outputs: float
  aliased: float
  host: float
  sent: dict[str, float]
  seconds: float
  refused: str = ""


def available() -> bool:
  return importlib.util.find_spec("libtpu") is not None


def devices(topology: Topology) -> list:
  """The chips' descriptions. Raises ValueError, one line, where libtpu knows no such topology."""
  how = {"num_slices": topology.slices} if topology.slices > 1 else {}
  if topology.chips == 1:
    how["chips_per_host_bounds"] = (1, 1, 1)
  try:
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **how).devices
  except Exception as error:  # libtpu's own kinds
    line = str(error).strip().splitlines()[0][:200]
    raise ValueError(f"libtpu has no topology {topology.name}: {line}") from None
  return list(found)


def programs(config, model, topology: Topology):
  """Yields (name, a function that lowers it, the mesh it is for)."""
  chips = devices(topology)
  block = config.mesh
  mesh = sharding.make_mesh(
    block.data, block.fsdp, block.tensor, chips, sequence=block.get("sequence", 1)
  )
  optimizer = optim.make_optimizer(**train.optimizer_arguments(config))
  adapter = lora.from_config(config.lora)
  state = train.abstract_state(model, optimizer, mesh, config.model.param_dtype, adapter)
  frozen = {} if adapter is None else policy.abstract_params(model, mesh, model.dtype)
  sampled = lora.whole(adapter, frozen, state["params"])

  def update():
    step = jax.jit(
      train.make_update(config, model, optimizer, adapter),
      donate_argnums=0,
      out_shardings=(train.layout(state), None),
    )
    return step.lower(state, batch(config, mesh), frozen)

  yield "train step", update, mesh

  def init():
    where = train.layout(state["opt_state"])
    return jax.jit(optimizer.transform.init, out_shardings=where).lower(state["params"])

  yield "optimizer init", init, mesh
  if config.job == "sft":
    return

  side_by_side = sharding.side_by_side(mesh)

  def reshard():
    cast = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, model.dtype, sharding=x.sharding), sampled
    )
    same = jax.jit(lambda x: x, out_shardings=weights.layout(sampled, side_by_side))
    return same.lower(cast)

  yield "weight reshard", reshard, mesh

  replica = sharding.replica_meshes(mesh)[0]
  shapes = memory.engine_shapes(config.rollout, memory.MeshSizes(dict(mesh.shape)))
  own = jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, model.dtype, sharding=where),
    sampled,
    weights.layout(sampled, replica),
  )
  ints = lambda *size: on(replica, size, jnp.int32)  # noqa: E731
  width = shapes.widths[-1]

  def prefill():
    R, T = shapes.prefill_rows, shapes.prefill_tokens
    pages = sampling_state(model, shapes, replica).kv_cache
    return sampler.prefill.lower(model, own, pages, ints(R, T), ints(R), ints(R), ints(R, width))

  def decode():
    held = sampling_state(model, shapes, replica)
    how = {"chunk": shapes.chunk, "truncated_logp": False}
    return sampler.decode.lower(model, own, held, ints(shapes.rows, width), ints(), **how)

  yield "prefill", prefill, replica
  yield "decode", decode, replica


def compile_all(config, model, topology: Topology, say) -> dict[str, Compiled]:
  """Every program of the config. say(line): progress."""
  found = {}
  for name, lower, mesh in programs(config, model, topology):
    say(f"compiling {name} for {topology.name} ...")
    found[name] = compiled(lower, mesh)
    say(f"compiled {name} in {found[name].seconds:.0f} s")
  return found


def compiled(lower, mesh) -> Compiled:
  """What the compiler makes of a program."""
  begin = time.perf_counter()
  cache = jax.config.jax_compilation_cache_dir  # such programs can be written there, not read back
  jax.config.update("jax_compilation_cache_dir", None)
  try:
    with jax.set_mesh(mesh), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      lowered = lower()
      try:
        program = lowered.compile()
      except jax.errors.JaxRuntimeError as error:
        if not (refusal := REFUSAL.search(str(error))):
          raise
        number, unit = filter(None, refusal.groups())
        spent = time.perf_counter() - begin
        return Compiled(0, float(number) * UNIT[unit], 0, 0, 0, {}, spent, refusal[0])
  finally:
    jax.config.update("jax_compilation_cache_dir", cache)
  m = program.memory_analysis()
  sent = collectives.by_axes(collectives.collectives(program.as_text(), dict(mesh.shape)))
  return Compiled(
    m.argument_size_in_bytes,
    m.temp_size_in_bytes,
    m.output_size_in_bytes,
    m.alias_size_in_bytes,
    m.host_temp_size_in_bytes + m.host_argument_size_in_bytes,
    sent,
    time.perf_counter() - begin,
  )


def on(mesh, shape, dtype, letters: str = "", rules=sharding.ACTIVATIONS):
  spec = sharding.spec(rules, letters.ljust(len(shape), "_"), shape, mesh)
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def batch(config, mesh) -> Batch:
  """The largest step's rows, as train.py places them."""
  shape = (memory.rows_of_step(config), config.batch.row_length)
  ints, floats = (on(mesh, shape, dtype, "BT") for dtype in (jnp.int32, jnp.float32))
  rl = config.job != "sft"
  return Batch(
    tokens_BT=ints,
    positions_BT=ints,
    segments_BT=ints,
    weight_BT=floats,
    advantage_BT=floats if rl else None,
    behavior_logp_BT=floats if rl else None,
    reference_logp_BT=floats if rl and config.objective.kl_coef else None,
    lag_BT=ints if rl else None,
  )


def sampling_state(model, shapes, mesh) -> sampler.SamplingState:
  """The abstract state of a replica, laid out as sampler.create_state lays it out."""
  dtype = shapes.kv_dtype or model.dtype
  make = lambda: sampler.new_state(model, shapes.rows, shapes.pool, shapes.page, dtype, False)  # noqa: E731
  state = jax.eval_shape(make)
  place = lambda letters: lambda x: on(mesh, x.shape, x.dtype, letters[: x.ndim])  # noqa: E731
  cache = jax.tree.map(place("L_KSH"), state.kv_cache)
  history = jax.tree.map(place("BV"), state.history)
  rest = dataclasses.replace(state, kv_cache=None, history=None)
  return dataclasses.replace(jax.tree.map(place("B____"), rest), kv_cache=cache, history=history)
