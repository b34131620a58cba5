"""Bytes that a job keeps on a chip, by kind, from sizes alone: what the compiler will say, nearly.

Weights, optimizer, KV pages and what remat keeps are exact but for padding; what a layer's backward
pass needs beside them is a fit to libtpu's results (tests/goldens/plans.json).
"""

import dataclasses
import fnmatch
import math

from qed_jax import optim, sharding
from qed_jax.model import kv_cache, presets, qwen3
from qed_jax.rollout.device import Shapes

# Arrays as wide as all of a layer's products (F, N H, 2 K H and D together) that its backward pass
# has at once, in the compute dtype.
LAYER_ARRAYS = 11.0
GRADIENT_COPIES = 2  # of accumulated gradients: other layouts, and padding to tiles
QUERY_CHUNK = 1024  # of qed_kernels' plain XLA attention
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on a chip. Of training: weights, optimizer, gradients, activations (kept from the forward
  to the backward pass) and temporaries. Of sampling: its copy of the weights, keys and values, and
  the same of a frozen summariser."""

  weights: float = 0
  optimizer: float = 0
  gradients: float = 0
  activations: float = 0
  temporaries: float = 0
  batch: float = 0
  sampler: float = 0
  kv: float = 0
  reference: float = 0
  summariser: float = 0
  summariser_kv: float = 0

  @property
  def total(self) -> float:
    return sum(dataclasses.astuple(self))

  @property
  def scratch(self) -> float:
    """What the compiler calls temporaries: all that lives within a training step."""
    return self.gradients + self.activations + self.temporaries


@dataclasses.dataclass(frozen=True)
class MeshSizes:
  """The sizes of a mesh that need not exist; what sharding.spec asks of one."""

  shape: dict[str, int]

  @property
  def size(self) -> int:
    return math.prod(self.shape.values())


def mesh_sizes(config, devices: int) -> MeshSizes:
  """config.mesh over so many devices. Raises ValueError, one line, where it does not divide them,
  naming the nearest values that do."""
  block = config.mesh
  sequence = block.get("sequence", 1)
  for axis in ("data", "sequence", "tensor"):
    if devices % block.get(axis, 1):
      near = sorted(
        (d for d in range(1, devices + 1) if devices % d == 0), key=lambda d: abs(d - block[axis])
      )
      raise ValueError(
        f"config.mesh.{axis} is {block[axis]}, which does not divide {devices} devices: "
        f"use {' or '.join(map(str, sorted(near[:2])))}"
      )
  others = block.data * sequence * block.tensor
  fsdp = devices // others if block.fsdp == -1 else block.fsdp
  if others * fsdp != devices:
    raise ValueError(
      f"config.mesh is data={block.data} x fsdp={block.fsdp} x sequence={sequence} x "
      f"tensor={block.tensor}, {others * fsdp} devices of {devices}: set fsdp=-1 and let "
      f"data x sequence x tensor divide {devices}"
    )
  return MeshSizes(
    dict(zip(sharding.AXES, (block.data, fsdp, sequence, block.tensor), strict=True))
  )


def check(config, model: qwen3.Qwen3Config, mesh: MeshSizes) -> None:
  """Raises ValueError, one line, for a mesh that the heads or the rows do not divide into."""
  tensor, rows = mesh.shape["tensor"], rows_at_once(config)
  if model.num_kv_heads % tensor:
    good = [t for t in range(1, model.num_kv_heads + 1) if model.num_kv_heads % t == 0]
    raise ValueError(
      f"config.mesh.tensor is {tensor}, the model has {model.num_kv_heads} key heads: use one of "
      f"{', '.join(map(str, good))}"
    )
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  if rows % ways:
    field = "microbatch_rows" if config.batch.microbatch_rows else "rows"
    near = {max(ways, rows // ways * ways), (rows // ways + 1) * ways}
    raise ValueError(
      f"config.batch.{field} is {rows}, which data x fsdp = {ways} does not divide: use "
      f"{' or '.join(map(str, sorted(near)))}"
    )
  if config.batch.microbatch_rows and config.batch.rows % config.batch.microbatch_rows:
    raise ValueError(
      f"config.batch.rows is {config.batch.rows}, no multiple of config.batch.microbatch_rows = "
      f"{config.batch.microbatch_rows}: use {rows} or a multiple of it"
    )
  tokens = mesh.shape["sequence"]
  if config.batch.row_length % (2 * tokens) and tokens > 1:
    step = 256 * tokens
    raise ValueError(
      f"config.batch.row_length is {config.batch.row_length}, which sequence={tokens} does not "
      f"divide: use {-(-config.batch.row_length // step) * step}"
    )


def sizes(config) -> qwen3.Qwen3Config:
  """Of the preset that config.model.preset or config.init names; nothing is fetched."""
  name = config.model.preset or config.init.rstrip("/").split("/")[-1].lower()
  block = config.model
  return presets.from_preset(name, dtype=block.dtype, remat=block.remat, attention=block.attention)


def rows_of_step(config) -> int:
  """Rows of the largest step: in RL every attempt as long as they may be, one a row."""
  rows = config.batch.rows
  if config.job == "sft":
    return rows
  attempts = config.rollout.problems * config.rollout.attempts
  attempts *= config.cache.states if config.job == "cache_rl" else 1
  held = max(1, config.batch.row_length // config.rollout.max_length)
  return -(-attempts // held // rows) * rows


def rows_at_once(config) -> int:
  return config.batch.microbatch_rows or rows_of_step(config)


def shard_bytes(config: qwen3.Qwen3Config, mesh, dtype: str, rules=sharding.WEIGHTS) -> float:
  """All parameters' share of a chip."""
  total = 0
  for path, shape in qwen3.shapes(config).items():
    spec = sharding.spec(rules, qwen3.DIMS[path], shape, mesh)
    named = [a for axes in spec for a in ((axes,) if isinstance(axes, str) else axes or ())]
    total += math.prod(shape) // math.prod(mesh.shape[a] for a in named)
  return total * BYTES[dtype]


def tokens_at_once(config, mesh) -> float:
  """Of a chip, in the forward and backward pass."""
  ways = mesh.size
  return rows_at_once(config) * config.batch.row_length / ways


def estimate(config, model: qwen3.Qwen3Config, mesh, on_tpu: bool = True) -> Memory:
  """Bytes a chip while `config` trains on a mesh of these sizes.

  on_tpu: with tiles, which pad what is split finely, and layouts that gradients are copied between;
  on a GPU plain XLA attends instead of a kernel, with blocks of scores.
  """
  lora = config.get("lora")
  adapted = bool(lora and lora.rank)
  held = shard_bytes(model, mesh, model.dtype if adapted else config.model.param_dtype)
  trained = shard_bytes(model, mesh, config.model.param_dtype)
  if adapted:  # what is frozen stays in the compute dtype
    trained *= adapter_parameters(model, lora) / parameters(model)
  weights = held + trained if adapted else trained
  count = trained / BYTES[config.model.param_dtype]
  tokens, wide = tokens_at_once(config, mesh), BYTES[model.dtype]
  microbatches = rows_of_step(config) > rows_at_once(config)
  heads = model.num_heads * model.head_dim
  widths = model.intermediate_size + heads + 2 * model.num_kv_heads * model.head_dim
  widths += model.hidden_size
  tensor = mesh.shape["tensor"]
  # The head, gathered to be multiplied, and its gradient before it is split.
  head = model.vocab_size * model.hidden_size / tensor * (wide + (0 if adapted else 4))
  if on_tpu:
    also = GRADIENT_COPIES * trained if microbatches else 0.0
  else:  # scores, probabilities and their gradient of a chunk of queries
    rows = max(1, rows_at_once(config) // (mesh.shape["data"] * mesh.shape["fsdp"]))
    also = 3 * 4 * rows * model.num_heads / tensor * QUERY_CHUNK * config.batch.row_length
  memory = Memory(
    weights=weights,
    optimizer=count * optim.moment_bytes(config.optimizer.mu_dtype, config.optimizer.second_moment),
    gradients=trained * (2 if microbatches else 1),
    activations=kept_bytes(model) * tokens,
    temporaries=LAYER_ARRAYS * widths * tokens * wide + head + also,
    batch=rows_of_step(config)
    * config.batch.row_length
    * (16 if config.job == "sft" else 28)
    / mesh.size,
  )
  if config.job == "sft":
    return memory
  shapes = engine_shapes(config.rollout, mesh)
  same_type = adapted and lora.sampler == "unmerged" or config.model.param_dtype == model.dtype
  shared = same_type and mesh.shape["fsdp"] * mesh.shape["sequence"] == 1
  whole = {letter: axes for letter, axes in sharding.WEIGHTS.items() if letter != "D"}
  copy = shard_bytes(model, mesh, model.dtype, whole)
  memory = dataclasses.replace(
    memory,
    sampler=0 if shared else copy,
    kv=pool_bytes(model, shapes, tensor),
    reference=shard_bytes(model, mesh, model.dtype) if config.objective.kl_coef else 0,
  )
  if config.job == "cache_rl" and config.cache.summariser:
    memory = dataclasses.replace(
      memory,
      summariser=copy,
      summariser_kv=pool_bytes(model, engine_shapes(config.rollout, mesh, config.cache), tensor),
    )
  return memory


def kept_bytes(model: qwen3.Qwen3Config) -> float:
  """What remat keeps of a token on the device, over all layers."""
  D, F = model.hidden_size, model.intermediate_size
  heads, keys = model.num_heads * model.head_dim, 2 * model.num_kv_heads * model.head_dim
  products = heads + keys + D + 2 * F + D
  width = {
    "offload": 0,
    "layer": D,
    "attention": D + heads + 2 * model.num_heads,  # a float32 for each head's sum
    "dots": D + products,
    "none": D + products + 4 * D + 2 * heads + keys + 2 * F,
  }[model.remat]
  return model.num_layers * width * BYTES[model.dtype]


def offloaded_bytes(model: qwen3.Qwen3Config) -> float:
  """What remat keeps of a token in the host's memory, over all layers."""
  kept = model.num_layers * model.hidden_size * BYTES[model.dtype]
  return kept if model.remat == "offload" else 0


def engine_shapes(block, mesh, of=None) -> Shapes:
  """The shapes of a replica. of: the block that says how many slots and pages, if another."""
  replicas = mesh.size // mesh.shape["tensor"] * block.lanes
  fields = {f.name: block[f.name] for f in dataclasses.fields(Shapes)}
  fields |= {name: (of or block)[name] for name in ("slots", "pages")}
  for name in ("slots", "pages"):
    if fields[name] % replicas:
      more = -(-fields[name] // replicas) * replicas
      where = "cache" if of is not None else "rollout"
      raise ValueError(
        f"config.{where}.{name} is {fields[name]}, no multiple of the {replicas} replicas (rows of "
        f"tensor={mesh.shape['tensor']}): use {more}"
      )
    fields[name] //= replicas
  return Shapes(**fields)


def pool_bytes(model: qwen3.Qwen3Config, shapes: Shapes, tensor: int) -> float:
  """Keys and values of a replica's pages, a chip's share."""
  a_token = kv_cache.bytes_per_token(model, shapes.kv_dtype or model.dtype)
  return shapes.pool * shapes.page * a_token / tensor


def parameters(model: qwen3.Qwen3Config) -> int:
  return sum(math.prod(shape) for shape in qwen3.shapes(model).values())


def adapter_parameters(model: qwen3.Qwen3Config, lora) -> int:
  """Of pairs of rank lora.rank beside the projections that lora.targets names: "all-linear", or
  names and wildcards with commas between."""
  names = [name.strip() for name in lora.targets.split(",")]
  patterns = ["*" if name == "all-linear" else f"*{name}" for name in names]
  total = 0
  for path, shape in qwen3.shapes(model).items():
    if path.endswith("_proj") and any(fnmatch.fnmatchcase(path, p) for p in patterns):
      other = math.prod(shape[1:]) // model.hidden_size  # of inputs and outputs one is the width
      total += shape[0] * lora.rank * (model.hidden_size + other)
  return total
