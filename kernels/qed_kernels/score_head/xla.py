"""The scoring head in plain XLA, for every device and mesh: a chunk of tokens at a time.

The gradient is written out instead of being derived: the forward pass keeps two numbers a token,
and the backward pass makes a chunk's logits once more and needs no sum over them. The head's
gradient is added up over chunks in the wide type and rounded once.

M stands for the tokens of a chunk. On a mesh it is two dimensions, rows and tokens of a row, since
each has its own layout; on one device it is one, as products over two are slow on a CPU.
"""

import functools

import jax
import jax.numpy as jnp

from qed_kernels.dense import product, wide


def score_head(x_BTD, w_VD, target_BT, temperature, chunk: int, pin):
  """As the reference, in float32 or, for such x, in float64."""
  B, T = target_BT.shape
  chunk = min(chunk, T)
  pad = -T % chunk
  size = (B * chunk,) if pin is None else (B, chunk)

  def split(x_BTx):
    x_BTx = jnp.pad(x_BTx, ((0, 0), (0, pad)) + ((0, 0),) * (x_BTx.ndim - 2))
    x_nBCx = jnp.moveaxis(x_BTx.reshape(B, -1, chunk, *x_BTx.shape[2:]), 1, 0)
    return x_nBCx.reshape(-1, *size, *x_BTx.shape[2:])

  def join(x_nM):
    return jnp.moveaxis(x_nM.reshape(-1, B, chunk), 0, 1).reshape(B, T + pad)[:, :T]

  temperature = jnp.asarray(temperature, wide(x_BTD.dtype))
  logp_nM, entropy_nM = over_chunks(pin, temperature, split(x_BTD), w_VD, split(target_BT))
  return join(logp_nM), join(entropy_nM)


def logits(pin, temperature, x_MD, w_VD):
  if pin is None:
    return product("MD,VD->MV", x_MD, w_VD) / temperature
  return pin(product("BCD,VD->BCV", x_MD, w_VD), "BCV") / temperature


def is_target(z_MV, target_M):
  return jax.lax.broadcasted_iota(jnp.int32, z_MV.shape, z_MV.ndim - 1) == target_M[..., None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def over_chunks(pin, temperature, x_nMD, w_VD, target_nM):
  """-> logp_nM, entropy_nM."""
  return forward(pin, temperature, x_nMD, w_VD, target_nM)[0]


def forward(pin, temperature, x_nMD, w_VD, target_nM):
  w_low_VD = w_VD.astype(x_nMD.dtype)

  def of_chunk(chunk):
    x_MD, target_M = chunk
    z_MV = logits(pin, temperature, x_MD, w_low_VD)
    lse_M = jax.nn.logsumexp(z_MV, axis=-1)
    logp_M = jnp.sum(jnp.where(is_target(z_MV, target_M), z_MV, 0), axis=-1) - lse_M
    # Not lse - sum(p z): with large logits that is the small difference of two large numbers.
    logp_MV = z_MV - lse_M[..., None]
    return logp_M, -jnp.sum(jnp.exp(logp_MV) * logp_MV, axis=-1), lse_M

  logp_nM, entropy_nM, lse_nM = jax.lax.map(of_chunk, (x_nMD, target_nM))
  return (logp_nM, entropy_nM), (temperature, x_nMD, w_VD, target_nM, entropy_nM, lse_nM)


def backward(pin, kept, cotangents):
  """d logp / d z = [target] - p, and d entropy / d z = -p (log p + entropy)."""
  temperature, x_nMD, w_VD, target_nM, entropy_nM, lse_nM = kept
  w_low_VD = w_VD.astype(x_nMD.dtype)
  M = "M" if pin is None else "BC"

  def of_chunk(dw_VD, chunk):
    x_MD, target_M, entropy_M, lse_M, dlogp_M, dentropy_M = chunk
    z_MV = logits(pin, temperature, x_MD, w_low_VD)
    logp_MV = z_MV - lse_M[..., None]
    weight_M = dlogp_M + dentropy_M * entropy_M
    dz_MV = -jnp.exp(logp_MV) * (weight_M[..., None] + dentropy_M[..., None] * logp_MV)
    dz_MV += jnp.where(is_target(z_MV, target_M), dlogp_M[..., None], 0)
    dz_MV = (dz_MV / temperature).astype(x_MD.dtype)
    dx_MD = product(f"{M}V,VD->{M}D", dz_MV, w_low_VD).astype(x_MD.dtype)
    return dw_VD + product(f"{M}V,{M}D->VD", dz_MV, x_MD), dx_MD

  zeros_VD = jnp.zeros(w_VD.shape, wide(x_nMD.dtype))
  chunks = (x_nMD, target_nM, entropy_nM, lse_nM, *cotangents)
  dw_VD, dx_nMD = jax.lax.scan(of_chunk, zeros_VD, chunks)
  return None, dx_nMD, dw_VD.astype(w_VD.dtype), None


over_chunks.defvjp(forward, backward)
