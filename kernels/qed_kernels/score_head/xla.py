"""The scoring head in plain XLA, for every device and mesh: a chunk of tokens at a time.

The gradient is written out instead of being derived: the forward pass keeps two numbers a token,
and the backward pass makes a chunk's logits once more and needs no sum over them. The head's
gradient is added up over chunks in the wide type and rounded once.
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
  # On one device a chunk is one row of B * chunk tokens: XLA on a CPU is slow in products over two
  # dimensions. On several the two stay apart, since each has its own layout.
  rows = 1 if pin is None else B

  def split(x_BTx):
    x_BTx = jnp.pad(x_BTx, ((0, 0), (0, pad)) + ((0, 0),) * (x_BTx.ndim - 2))
    x_nBCx = jnp.moveaxis(x_BTx.reshape(B, -1, chunk, *x_BTx.shape[2:]), 1, 0)
    return x_nBCx.reshape(-1, rows, B * chunk // rows, *x_BTx.shape[2:])

  def join(x_nBC):
    x_nBC = x_nBC.reshape(-1, B, chunk)
    return jnp.moveaxis(x_nBC, 0, 1).reshape(B, T + pad)[:, :T]

  temperature = jnp.asarray(temperature, wide(x_BTD.dtype))
  out = over_chunks(pin, temperature, split(x_BTD), w_VD, split(target_BT))
  return join(out[0]), join(out[1])


def logits(pin, temperature, x_BCD, w_VD):
  z_BCV = product("BCD,VD->BCV", x_BCD, w_VD)
  return (z_BCV if pin is None else pin(z_BCV, "BCV")) / temperature


def is_target(z_BCV, target_BC):
  return jax.lax.broadcasted_iota(jnp.int32, z_BCV.shape, 2) == target_BC[..., None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def over_chunks(pin, temperature, x_nBCD, w_VD, target_nBC):
  """-> logp_nBC, entropy_nBC."""
  return forward(pin, temperature, x_nBCD, w_VD, target_nBC)[0]


def forward(pin, temperature, x_nBCD, w_VD, target_nBC):
  w_low_VD = w_VD.astype(x_nBCD.dtype)

  def of_chunk(chunk):
    x_BCD, target_BC = chunk
    z_BCV = logits(pin, temperature, x_BCD, w_low_VD)
    largest_BC = jnp.max(z_BCV, axis=-1)
    # Below the largest, not as they are: with large logits the entropy would be the small
    # difference of two large numbers.
    below_BCV = z_BCV - largest_BC[..., None]
    e_BCV = jnp.exp(below_BCV)
    sum_BC = jnp.sum(e_BCV, axis=-1)
    mean_BC = jnp.sum(e_BCV * below_BCV, axis=-1) / sum_BC
    own_BC = jnp.sum(jnp.where(is_target(z_BCV, target_BC), below_BCV, 0), axis=-1)
    log_BC = jnp.log(sum_BC)
    return own_BC - log_BC, log_BC - mean_BC, largest_BC + log_BC

  logp_nBC, entropy_nBC, lse_nBC = jax.lax.map(of_chunk, (x_nBCD, target_nBC))
  return (logp_nBC, entropy_nBC), (temperature, x_nBCD, w_VD, target_nBC, entropy_nBC, lse_nBC)


def backward(pin, kept, cotangents):
  """d logp / d z = [target] - p, and d entropy / d z = -p (log p + entropy)."""
  temperature, x_nBCD, w_VD, target_nBC, entropy_nBC, lse_nBC = kept
  w_low_VD = w_VD.astype(x_nBCD.dtype)

  def of_chunk(dw_VD, chunk):
    x_BCD, target_BC, entropy_BC, lse_BC, dlogp_BC, dentropy_BC = chunk
    z_BCV = logits(pin, temperature, x_BCD, w_low_VD)
    logp_BCV = z_BCV - lse_BC[..., None]
    weight_BC = dlogp_BC + dentropy_BC * entropy_BC
    dz_BCV = -jnp.exp(logp_BCV) * (weight_BC[..., None] + dentropy_BC[..., None] * logp_BCV)
    dz_BCV += jnp.where(is_target(z_BCV, target_BC), dlogp_BC[..., None], 0)
    dz_BCV = (dz_BCV / temperature).astype(x_BCD.dtype)
    dx_BCD = product("BCV,VD->BCD", dz_BCV, w_low_VD).astype(x_BCD.dtype)
    return dw_VD + product("BCV,BCD->VD", dz_BCV, x_BCD), dx_BCD

  zeros_VD = jnp.zeros(w_VD.shape, wide(x_nBCD.dtype))
  chunks = (x_nBCD, target_nBC, entropy_nBC, lse_nBC, *cotangents)
  dw_VD, dx_nBCD = jax.lax.scan(of_chunk, zeros_VD, chunks)
  return None, dx_nBCD, dw_VD.astype(w_VD.dtype), None


over_chunks.defvjp(forward, backward)
