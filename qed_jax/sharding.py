"""The mesh, the dimension letters and the two rule tables: the only file that names a mesh axis.

One alphabet serves einsum subscripts, array name suffixes and sharding:

  B rows of a batch          D model width            L layers
  T tokens, query side       F MLP hidden width       C chunk of T in the scored loss
  S tokens, key side         V vocabulary             P problems (groups)
  N query heads  K key/value heads  G = N / K  H head dimension  A attempts per group

An array of letters "BTNH" is laid out by looking each letter up in a table. A mesh axis is used
once an array: heads, MLP and vocabulary claim `tensor` before T does, so T is sharded over it
exactly between the blocks, where the residual stream is [B, T, D] (sequence parallelism). Over
`sequence` T is sharded everywhere (context parallelism): a row may be too long for a chip. Weights
are split over `fsdp` and `sequence` alike.
"""

import functools
import math
import os

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "sequence", "tensor")
WEIGHTS = {
  "D": ("fsdp", "sequence"),
  "N": ("tensor",),
  "K": ("tensor",),
  "F": ("tensor",),
  "V": ("tensor",),
}
ACTIVATIONS = {
  "B": ("data", "fsdp"),
  "N": ("tensor",),
  "K": ("tensor",),
  "F": ("tensor",),
  "V": ("tensor",),
  "T": ("sequence", "tensor"),
}
CLAIMS_LAST = "T"


def initialize_hosts() -> None:
  """Join the other hosts of a TPU slice, a Slurm job or JAX_COORDINATOR_ADDRESS, where there are
  any.

  The same command runs on every host. On a single machine this does nothing.
  """
  tpu_hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
  several = (
    len(tpu_hosts) > 1
    or int(os.environ.get("SLURM_NTASKS", "1")) > 1
    or "JAX_COORDINATOR_ADDRESS" in os.environ
    or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
  )
  if several and not jax.distributed.is_initialized():
    jax.distributed.initialize()


def make_mesh(data: int, fsdp: int, tensor: int, devices=None, *, sequence: int = 1) -> Mesh:
  """A mesh of data x fsdp x sequence x tensor devices; fsdp=-1 takes whatever the others leave.

  Raises ValueError when the product is not the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  if fsdp == -1:
    fsdp = max(1, len(devices) // (data * sequence * tensor))
  shape = (data, fsdp, sequence, tensor)
  if math.prod(shape) != len(devices):
    raise ValueError(
      f"mesh data={data} x fsdp={fsdp} x sequence={sequence} x tensor={tensor} needs "
      f"{math.prod(shape)} devices, this run has {len(devices)}: change config.mesh"
    )
  # jax.make_mesh refuses an axis of 4 on the 8 x 8 chips of a v6e; on a v5e it splits like this.
  ordered = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return Mesh(ordered, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replica_meshes(mesh: Mesh) -> list[Mesh]:
  """The mesh cut into meshes of its `tensor` axis alone, on which engines run side by side."""
  # Not made by make_mesh, which orders devices by where they are on a TPU: weights come here device
  # by device, through `side_by_side`.
  rows = mesh.devices.reshape(-1, mesh.shape["tensor"])
  automatic = (AxisType.Auto,) * len(AXES)
  return [Mesh(row[None, None, None], AXES, axis_types=automatic) for row in rows]


def side_by_side(mesh: Mesh) -> Mesh:
  """The same devices in the same order: `tensor` as it is, everything else replicas of it."""
  rows = mesh.devices.reshape(-1, mesh.shape["tensor"])
  return Mesh(rows[:, None, None, :], AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec(rules: dict, letters: str, shape: tuple, mesh) -> P:
  """Letters -> PartitionSpec. A dimension is not split over axes that do not divide it, nor over
  those of one device."""
  taken, axes = set(), [None] * len(letters)
  for i in sorted(range(len(letters)), key=lambda i: letters[i] in CLAIMS_LAST):
    own, left = [], shape[i]
    for axis in rules.get(letters[i], ()):
      size = mesh.shape[axis]
      if axis not in taken and size > 1 and left % size == 0:
        own.append(axis)
        left //= size
    axes[i] = tuple(own) if len(own) > 1 else next(iter(own), None)
    taken |= set(own)
  return P(*axes)


def shardings(rules: dict, mesh: Mesh, letters, shapes):
  """A NamedSharding for each leaf of two matching trees: letters and shapes."""
  return jax.tree.map(
    lambda dims, shape: NamedSharding(mesh, spec(rules, dims, shape, mesh)), letters, shapes
  )


def several_devices() -> bool:
  """Whether what is being traced is for a mesh of more than one device."""
  mesh = jax.sharding.get_abstract_mesh()
  return not mesh.empty and mesh.size > 1


def constrain(x, letters: str):
  """Pin an activation's layout by its letters; nothing to do outside a mesh."""
  return _laid_out(ACTIVATIONS, x, letters)


def _laid_out(rules: dict, x, letters: str):
  if not several_devices():
    return x
  mesh = jax.sharding.get_abstract_mesh()
  return jax.lax.with_sharding_constraint(x, spec(rules, letters, x.shape, mesh))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(w, letters: str):
  """A weight with its D whole, as it is used; its gradient is summed and split again.

  XLA left to itself gathers the activations instead, whose T is split over the same axes.
  """
  return _laid_out({k: axes for k, axes in WEIGHTS.items() if k != "D"}, w, letters)


gathered.defvjp(
  lambda w, letters: (gathered(w, letters), None),
  lambda letters, _, dw: (_laid_out(WEIGHTS, gathered(dw, letters), letters),),
)


def token_shares(T: int) -> int:
  """How many ways the T tokens of a row are split wherever something else has claimed `tensor`."""
  if not several_devices():
    return 1
  shares = jax.sharding.get_abstract_mesh().shape["sequence"]
  return shares if T % shares == 0 else 1


def rows_divisor(mesh: Mesh) -> int:
  """How many ways the rows of a batch are split."""
  return math.prod(mesh.shape[a] for a in ACTIVATIONS["B"])


def put(mesh: Mesh, tree, letters: str):
  """Host arrays -> global device arrays laid out by `letters`; each host passes its own rows.

  Raises ValueError, one line, where several hosts would have to hold the same row.
  """
  hosts, ways = jax.process_count(), rows_divisor(mesh)

  def place(x):
    x = np.asarray(x)
    shape = (x.shape[0] * hosts, *x.shape[1:])
    if hosts > 1 and (shape[0] % ways or ways % hosts):
      raise ValueError(
        f"{shape[0]} rows of {hosts} hosts do not split over data x fsdp = {ways}, whole rows on "
        "each host: change config.mesh or config.batch"
      )
    layout = NamedSharding(mesh, spec(ACTIVATIONS, letters[: x.ndim], shape, mesh))
    return jax.make_array_from_process_local_data(layout, x, shape)

  return jax.tree.map(place, tree)


def whole(mesh: Mesh) -> NamedSharding:
  """The same value on every device."""
  return NamedSharding(mesh, P())


def replicate(mesh: Mesh, tree):
  """Host values -> the same arrays on every device."""
  return jax.device_put(tree, whole(mesh))
