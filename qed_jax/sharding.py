"""The mesh, the dimension letters and the two rule tables: the only file that names a mesh axis.

One alphabet serves einsum subscripts, array name suffixes and sharding:

  B rows of a batch          D model width            L layers
  T tokens, query side       F MLP hidden width       C chunk of T in the scored loss
  S tokens, key side         V vocabulary             P problems (groups)
  N query heads  K key/value heads  G = N / K  H head dimension  A attempts per group
  R rank of an adapter

An array of letters "BTNH" is laid out by looking each letter up in a table. A mesh axis is used
once an array: heads, MLP and vocabulary claim `tensor` before T does, so T is sharded over it
exactly between the blocks, where the residual stream is [B, T, D] (sequence parallelism). Over
`sequence` T is sharded everywhere (context parallelism): a row may be too long for a chip. Weights
are split over `fsdp` and `sequence` alike.
"""

import functools
import math

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


def make_mesh(data: int, fsdp: int, tensor: int, devices=None, *, sequence: int = 1) -> Mesh:
  """A mesh of data x fsdp x sequence x tensor devices; fsdp=-1 takes whatever the others leave.

  Where the devices are of several TPU slices, `data` alone crosses the network between them.
  Raises ValueError when the product is not the number of devices, or the slices do not divide data.
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
  slices = len({getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"}) or 1
  if slices == 1:
    # jax.make_mesh refuses an axis of 4 on the 8 x 8 chips of a v6e; on a v5e it splits like this.
    ordered = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(ordered, AXES, axis_types=(AxisType.Auto,) * len(AXES))
  if data % slices:
    raise ValueError(
      f"config.mesh.data is {data} and this run has {slices} slices: only data crosses slices, so "
      f"give a multiple of {slices}"
    )
  inside = (data // slices, fsdp, sequence, tensor)
  ordered = mesh_utils.create_hybrid_device_mesh(
    inside, (slices, 1, 1, 1), devices, allow_split_physical_axes=True
  )
  return Mesh(ordered, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def by_host(devices) -> np.ndarray:
  """The devices, a row for each host, in the order of hosts and of their numbers [hosts, devices].

  Raises ValueError when hosts have different numbers of them.
  """
  rows: dict[int, list] = {}
  for device in sorted(devices, key=lambda d: (d.process_index, d.id)):
    rows.setdefault(device.process_index, []).append(device)
  sizes = {host: len(row) for host, row in rows.items()}
  if len(set(sizes.values())) > 1:
    raise ValueError(f"hosts have different numbers of devices ({sizes}): use equal hosts")
  return np.array(list(rows.values()))


def within_hosts(devices, tensor: int) -> Mesh:
  """These devices of all hosts in rows of `tensor`, each row on one host: what engines sample on.

  A mesh to train on may lay `tensor` across hosts. Raises ValueError when no row fits a host.
  """
  rows = by_host(devices)
  if rows.shape[1] % tensor:
    raise ValueError(
      f"config.mesh.tensor is {tensor} and a host has {rows.shape[1]} devices to sample on: an "
      "engine keeps to its host, so give a divisor of that"
    )
  return _rows_of_tensor(rows.reshape(-1, tensor))


def this_hosts_rows(mesh: Mesh) -> Mesh:
  """This host's rows of a mesh that `within_hosts` made."""
  rows = mesh.devices.reshape(-1, mesh.shape["tensor"])
  return _rows_of_tensor(rows[[row[0].process_index == jax.process_index() for row in rows]])


def _rows_of_tensor(rows: np.ndarray) -> Mesh:
  return Mesh(rows[:, None, None, :], AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replica_meshes(mesh: Mesh) -> list[Mesh]:
  """The mesh cut into meshes of its `tensor` axis alone, on which engines run side by side."""
  # Not made by make_mesh, which orders devices by where they are on a TPU: weights come here device
  # by device, through `side_by_side`.
  rows = mesh.devices.reshape(-1, mesh.shape["tensor"])
  automatic = (AxisType.Auto,) * len(AXES)
  return [Mesh(row[None, None, None], AXES, axis_types=automatic) for row in rows]


def side_by_side(mesh: Mesh) -> Mesh:
  """The same devices in the same order: `tensor` as it is, everything else replicas of it."""
  return _rows_of_tensor(mesh.devices.reshape(-1, mesh.shape["tensor"]))


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
  """Host arrays -> global device arrays laid out by `letters`.

  Each host passes rows of its own, the same number of them; the whole is theirs in the order of
  hosts. A device that needs rows of another host gets them from there.
  """
  devices = by_host(mesh.devices.flat)
  hosts = len(devices)
  given = NamedSharding(Mesh(devices, ("host", "device")), P("host"))

  def place(x):
    x = np.asarray(x)
    shape = (x.shape[0] * hosts, *x.shape[1:])
    layout = NamedSharding(mesh, spec(ACTIVATIONS, letters[: x.ndim], shape, mesh))
    if hosts == 1:
      return jax.make_array_from_process_local_data(layout, x, shape)
    return jax.device_put(jax.make_array_from_process_local_data(given, x, shape), layout)

  return jax.tree.map(place, tree)


def in_turns(mesh: Mesh, tree, at_once: int):
  """What `put` gave, in an order in which each `at_once` rows in turn have as many of every host.

  So that hosts work on a microbatch of their own rows, all at the same time. As it is where there
  is one host, or numbers do not divide.
  """
  hosts, rows = len(by_host(mesh.devices.flat)), jax.tree.leaves(tree)[0].shape[0]
  if hosts == 1 or not 0 < at_once < rows or rows % at_once or at_once % hosts:
    return tree
  return jax.tree.map(lambda x: _in_turns(x, hosts, at_once // hosts, x.sharding), tree)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _in_turns(x, hosts: int, each: int, layout: NamedSharding):
  x = x.reshape(hosts, -1, each, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)
  return jax.lax.with_sharding_constraint(x, layout)


def whole(mesh: Mesh) -> NamedSharding:
  """The same value on every device."""
  return NamedSharding(mesh, P())


def replicate(mesh: Mesh, tree):
  """Host values -> the same arrays on every device."""
  return jax.device_put(tree, whole(mesh))
