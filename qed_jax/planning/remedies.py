"""The cheapest change to a config that makes it fit: tried with the estimate, then compiled."""

import dataclasses
import itertools

from ml_collections import ConfigDict

from qed_jax.planning import memory, roofline
from qed_jax.planning.chips import Topology

CHEAPER_REMAT = {"none": "dots", "dots": "attention", "attention": "layer", "layer": "offload"}


@dataclasses.dataclass(frozen=True)
class Remedy:
  """changes: {field: value}. bytes: of a chip with them. seconds: of its training step."""

  changes: dict
  bytes: float
  seconds: float

  @property
  def flags(self) -> str:
    return " ".join(f"--config.{field}={value}" for field, value in self.changes.items())


def changed(config, changes: dict):
  """A copy with fields set by their paths."""
  copy = ConfigDict(config.to_dict())
  for path, value in changes.items():
    *parents, name = path.split(".")
    block = copy
    for parent in parents:
      block = block[parent]
    block[name] = value
  return copy


def candidates(config, mesh) -> list[dict]:
  """Single changes, each a lever of the config."""
  found = []
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  rows = memory.rows_at_once(config)
  if rows > ways:
    found.append({"batch.microbatch_rows": max(ways, rows // 2 // ways * ways)})
    found.append({"batch.microbatch_rows": ways})
  remat = config.model.remat
  while remat := CHEAPER_REMAT.get(remat):
    found.append({"model.remat": remat})
  for axis in ("sequence", "tensor"):
    for factor in (2, 4, 8):
      change = {f"mesh.{axis}": config.mesh.get(axis, 1) * factor}
      smaller = ways // factor if ways % factor == 0 else 0
      if smaller and config.mesh.fsdp == -1:
        change["batch.microbatch_rows"] = smaller
        found.append(change)
  if config.optimizer.mu_dtype == "float32":
    found.append({"optimizer.mu_dtype": "bfloat16"})
  if config.optimizer.second_moment == "float32":
    found.append({"optimizer.second_moment": "bfloat16"})
    found.append({"optimizer.mu_dtype": "bfloat16", "optimizer.second_moment": "bfloat16"})
  if config.optimizer.second_moment != "factored":
    found.append({"optimizer.mu_dtype": "bfloat16", "optimizer.second_moment": "factored"})
  if config.job != "sft":
    if config.rollout.kv_dtype != "int8":
      found.append({"rollout.kv_dtype": "int8"})
    pages = config.rollout.pages
    for share in (2, 4):
      if pages and pages % share == 0:
        found.append({"rollout.pages": pages // share})
  if config.model.param_dtype == "float32":
    found.append({"model.param_dtype": "bfloat16"})
  return found


def cheapest(config, topology: Topology, scale: float = 1.0) -> Remedy | None:
  """Of single changes and pairs of them the one with the shortest step; None where none fits.

  scale: the compiler's bytes over the estimate's for the config as it is.
  """
  mesh = memory.mesh_sizes(config, topology.devices)
  singles = candidates(config, mesh)
  pairs = [a | b for a, b in itertools.combinations(singles, 2) if not a.keys() & b.keys()]
  for tried in (singles, pairs):
    fitting = []
    for changes in tried:
      remedy = assess(config, changes, topology, scale)
      if remedy is not None and remedy.bytes <= topology.chip.memory:
        fitting.append(remedy)
    if fitting:
      # Of equal times the one listed first, which costs nothing but itself.
      return min(fitting, key=lambda r: r.seconds)
  return None


def assess(config, changes: dict, topology: Topology, scale: float) -> Remedy | None:
  """None where the changed config is impossible."""
  changed_config = changed(config, changes)
  try:
    model, mesh = memory.sizes(changed_config), memory.mesh_sizes(changed_config, topology.devices)
    memory.check(changed_config, model, mesh)
    needed = memory.estimate(changed_config, model, mesh, topology.is_tpu).total * scale
  except ValueError:
    return None
  traffic = roofline.traffic(changed_config, model, mesh, topology.slices)
  line = roofline.training(changed_config, model, mesh, topology.chip, traffic)
  return Remedy(changes, needed, line.seconds)
