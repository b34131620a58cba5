"""The least time that a training step and a decode step can take on a chip, and the MFU bound."""

import dataclasses
import math

from qed_jax import metrics
from qed_jax.model import flops, qwen3
from qed_jax.planning import memory
from qed_jax.planning.chips import Chip

# Forward passes that remat runs again: of the products with weights, and of attention.
AGAIN = {
  "none": (0, 0), "dots": (0, 1), "attention": (1, 0), "layer": (1, 1), "offload": (1, 1),
}  # fmt: skip
BOUNDS = ("compute", "hbm", "ici", "dcn", "host")


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Seconds of a step by what bounds it. flops: useful ones, of all chips. executed: with remat and
  the kernels' own recomputation, as time at the peak.

  The bound takes everything to overlap: MFU = flops / (the largest of the times x peak).
  """

  flops: float
  compute: float
  hbm: float
  ici: float
  dcn: float
  host: float
  peak: float

  @property
  def seconds(self) -> float:
    return max(getattr(self, name) for name in BOUNDS)

  @property
  def mfu(self) -> float:
    return self.flops / (self.seconds * self.peak)

  @property
  def bound_by(self) -> str:
    return max(BOUNDS, key=lambda name: getattr(self, name))


def training(
  config, model: qwen3.Qwen3Config, mesh, chip: Chip, by_axes: dict[str, float]
) -> Roofline:
  """by_axes: bytes that a chip sends in a step, by mesh axes; `data` crosses slices where there are
  several, which the caller says with a "dcn:" before the axes."""
  T, rows = config.batch.row_length, memory.rows_of_step(config)
  tokens = rows * T
  context = rows * T * (T + 1) / 2  # every row one attempt, or one example, from end to end
  products, attention = flops.forward(model, tokens, 0), flops.forward(model, 0, context)
  head = 2.0 * model.vocab_size * model.hidden_size * tokens
  layers = products - head
  again, attention_again = AGAIN[model.remat]
  peak = metrics.PEAK_FLOPS[chip.device_kind]
  # The head's kernel makes its logits twice; attention's backward pass has five products, not four.
  matmuls = layers * (3 + again) + 4 * head
  executed = matmuls + attention * (3.5 + attention_again) / chip.attention
  kept = memory.kept_bytes(model) * tokens / mesh.size
  steps = rows / memory.rows_at_once(config)
  trained = memory.estimate(config, model, mesh)
  whole = memory.parameters(model) * 2 / mesh.shape["tensor"]  # written and read once gathered
  moved = 2 * kept + steps * (3 + bool(again)) * 2 * whole
  moved += 2 * (trained.weights + trained.optimizer + steps * trained.gradients)
  inside = sum(x for name, x in by_axes.items() if not name.startswith("dcn:"))
  across = sum(x for name, x in by_axes.items() if name.startswith("dcn:"))
  return Roofline(
    flops=3 * (products + attention),
    compute=executed / mesh.size / peak,
    hbm=moved / chip.bandwidth,
    ici=inside / chip.link,
    dcn=across / chip.network,
    host=2 * memory.offloaded_bytes(model) * tokens / mesh.size / chip.host,
    peak=peak * mesh.size,
  )


def traffic(config, model: qwen3.Qwen3Config, mesh, slices: int) -> dict[str, float]:
  """Bytes that a chip sends in a training step, by axes, without a compiler: weights gathered and
  gradients split for every microbatch, activations exchanged in every layer."""
  steps = memory.rows_of_step(config) / memory.rows_at_once(config)
  split = mesh.shape["fsdp"] * mesh.shape["sequence"]
  tensor = mesh.shape["tensor"]
  whole = memory.parameters(model) * 2 / tensor
  passes = 3 + bool(AGAIN[model.remat][0]) - 1
  found = {}
  if split > 1:
    found["fsdp+sequence"] = steps * passes * whole * (split - 1) / split
  tokens = memory.rows_of_step(config) * config.batch.row_length / mesh.size
  if tensor > 1:
    # Gathered before each block's products and summed after them, forward and backward.
    of_layer = 4 * tokens * tensor * model.hidden_size * 2 * (tensor - 1) / tensor
    found["tensor"] = model.num_layers * of_layer * (2 + bool(AGAIN[model.remat][0]))
  if mesh.shape["sequence"] > 1:
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    found["sequence"] = model.num_layers * tokens * heads * 2 * 3
  if mesh.shape["data"] > 1:
    found["dcn:data" if slices > 1 else "data"] = steps * 2 * whole / split
  return found


def decode_seconds(
  model: qwen3.Qwen3Config, slots: int, context: int, kv_bytes: float, tensor: int, chip: Chip
) -> float:
  """Of one token for each of a replica's slots: weights, keys and values are read once."""
  weights = memory.parameters(model) * memory.BYTES[model.dtype] / tensor
  read = weights + slots * context * kv_bytes / tensor
  work = flops.forward(model, slots, slots * context) / tensor
  return max(read / chip.bandwidth, work / metrics.PEAK_FLOPS[chip.device_kind])


def gigabytes(x: float) -> float:
  return round(x / 1e9, 2) if math.isfinite(x) else x
