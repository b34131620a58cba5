"""The scoring head on a device or a mesh: the other way to qed_kernels.

Tokens do not need one another here. Where the rows of a batch are spread over all devices of a
mesh, each scores its own with the whole head, inside shard_map, and the head's gradient is added up
over devices once. On other meshes (`tensor` splits the vocabulary) XLA partitions the plain
implementation.
"""

import functools
import math

import jax
from jax.sharding import PartitionSpec as P
from qed_kernels.score_head import score_head

from qed_jax import sharding


def score_tokens(x_BTD, w_VD, target_BT, temperature, chunk: int):
  """-> log-probability of each target and entropy, float32 [B, T], of logits / temperature.

  chunk: tokens of a row whose logits are made at once where no kernel serves; no array of logits
  is larger.
  """
  run = functools.partial(score_head, chunk=chunk)
  if not sharding.several_devices():
    return run(x_BTD, w_VD, target_BT, temperature)
  mesh = jax.sharding.get_abstract_mesh()
  rows = sharding.spec(sharding.ACTIVATIONS, "B", target_BT.shape[:1], mesh)
  axes = () if rows[0] is None else (rows[0],) if isinstance(rows[0], str) else rows[0]
  if math.prod(mesh.shape[axis] for axis in axes) < mesh.size:
    return run(x_BTD, w_VD, target_BT, temperature, pin=sharding.constrain)
  own = jax.shard_map(
    run, mesh=mesh, in_specs=(rows, P(), rows, P()), out_specs=rows, check_vma=False
  )
  # In its narrow type, so that half as much is gathered.
  return own(x_BTD, w_VD.astype(x_BTD.dtype), target_BT, temperature)
