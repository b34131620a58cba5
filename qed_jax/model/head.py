"""The scoring head on a device or a mesh: the other way to qed_kernels.

Tokens do not need one another here. Where those of a batch are spread over all devices of a mesh,
each scores its own with the whole head, inside shard_map, and the head's gradient is added up over
devices once, in the type of the products as those of all weights are. On other meshes (`tensor`
splits the vocabulary) XLA partitions the plain implementation.
"""

import functools
import math

import jax
from jax.sharding import PartitionSpec as P
from qed_kernels.score_head import score_head

from qed_jax import sharding


def score_tokens(x_BTD, w_VD, target_BT, temperature, chunk: int, frozen: bool):
  """-> log-probability of each target and entropy, float32 [B, T], of logits / temperature.

  chunk: tokens of a row whose logits are made at once where no kernel serves; no array of logits
  is larger. frozen: the head is not trained.
  """
  run = functools.partial(score_head, chunk=chunk, frozen=frozen)
  if not sharding.several_devices():
    return run(x_BTD, w_VD, target_BT, temperature)
  B, T = target_BT.shape
  mesh = jax.sharding.get_abstract_mesh()
  tokens = sharding.spec(sharding.ACTIVATIONS, "BT", (B, T), mesh)
  axes = [
    axis for names in tokens for axis in ((names,) if isinstance(names, str) else names or ())
  ]
  if mesh.shape["tensor"] == 1 and math.prod(mesh.shape[axis] for axis in axes) == mesh.size:
    own = jax.shard_map(
      run, mesh=mesh, in_specs=(tokens, P(), tokens, P()), out_specs=tokens, check_vma=False
    )
    # In its narrow type, so that half as much is gathered.
    return own(x_BTD, w_VD.astype(x_BTD.dtype), target_BT, temperature)

  # Each device's share of a row as a row of its own, so that a chunk is of all devices' tokens.
  shares = sharding.token_shares(T)
  apart = lambda x: x.reshape(B, shares, -1, *x.shape[2:])  # noqa: E731

  def rows(x_BTx, letters):
    x_BsTx = sharding.constrain(x_BTx, letters)
    return x_BsTx.reshape(B * shares, *x_BsTx.shape[2:])

  def pin(z_RCV, letters):
    return rows(z_RCV.reshape(B, shares, *z_RCV.shape[1:]), "BT" + letters[1:])

  x_RTD, target_RT = rows(apart(x_BTD), "BT_D"), rows(apart(target_BT), "BT_")
  scores = run(x_RTD, w_VD, target_RT, temperature, pin=pin)
  return tuple(score_RT.reshape(B, T) for score_RT in scores)
