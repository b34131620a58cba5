"""Products with weights, RMSNorm, rotary positions: the small arithmetic of Qwen3."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qed_jax.sharding import several_devices


def einsum(equation: str, *operands, out_dtype=None):
  """jnp.einsum; float32 operands are multiplied in full float32 on every backend.

  TPUs and GPUs otherwise round float32 operands to bf16 or TF32, which breaks parity checks.
  """
  full = all(x.dtype in (jnp.float32, jnp.float64) for x in operands)
  return jnp.einsum(
    equation,
    *operands,
    precision=jax.lax.Precision.HIGHEST if full else None,
    preferred_element_type=out_dtype,
  )


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=("w", "a", "b"), meta_fields=("scale",)
)
@dataclasses.dataclass(frozen=True)
class Adapted:
  """A weight [out.., in..] with a low-rank change, w + scale b a, which is never multiplied out.

  It stands in a tree of parameters where the weight would. a: [R, in..]; b: [out.., R].
  """

  w: Any
  a: Any
  b: Any
  scale: float


def matrix(w, outputs: int):
  """A weight as [out, in], its first `outputs` dimensions being those of what it makes."""
  if isinstance(w, Adapted):
    a, b = matrix(w.a, 1), matrix(w.b, outputs)
    return dataclasses.replace(w, w=matrix(w.w, outputs), a=a, b=b)
  return w.reshape(math.prod(w.shape[:outputs]), -1)


def linear(x, w, out_dtype=None):
  """x [..., in] by w [out, in], or by an Adapted of such -> [..., out], computed in x's dtype.

  On one device it is a product of two matrices: of a product over [B, T], XLA on a CPU computes the
  weight's gradient from a transposed copy that takes as long. On several, B and T stay apart, since
  each has its own layout.
  """
  if isinstance(w, Adapted):
    change = linear(linear(x, w.a), w.b, out_dtype)
    return linear(x, w.w, out_dtype) + w.scale * change
  w = w.astype(x.dtype)
  if several_devices():
    return einsum("...I,OI->...O", x, w, out_dtype=out_dtype)
  y_MO = einsum("MI,OI->MO", x.reshape(-1, x.shape[-1]), w, out_dtype=out_dtype)
  return y_MO.reshape(*x.shape[:-1], w.shape[0])


def at_least_float32(dtype):
  """The type for norms, softmax and logits: float32, or float64 when computing in it."""
  return jnp.promote_types(dtype, jnp.float32)


def rms_norm(x, weight, eps: float):
  """x / rms(x) * weight over the last axis, computed in float32, returned in x.dtype."""
  wide = x.astype(at_least_float32(x.dtype))
  scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
  weight = jnp.expand_dims(weight.astype(wide.dtype), tuple(range(wide.ndim - 1)))
  return (wide * scale * weight).astype(x.dtype)


def rope_angles(positions_BT, head_dim: int, theta: float, dtype=jnp.float32):
  """cos, sin [B, T, 1, H/2] of the rotary angles.

  The inverse frequencies are float32 from the host, as transformers has them: at positions past
  32k a last-bit difference there shows in the logits. torch's float32 power is rounded correctly
  where numpy's is not, so the power is taken in float64 and then rounded.
  """
  exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
  power = np.power(np.float64(np.float32(theta)), exponent.astype(np.float64)).astype(np.float32)
  inverse_frequency = (np.float32(1.0) / power)[None, None, None]
  angle = positions_BT.astype(jnp.float32)[:, :, None, None] * inverse_frequency
  return jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype)


def rope(x_BTNH, cos, sin):
  """Rotate pairs (i, i + H/2): the layout of Hugging Face's `rotate_half`."""
  wide = x_BTNH.astype(cos.dtype)
  low, high = jnp.split(wide, 2, axis=-1)
  return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], -1).astype(x_BTNH.dtype)
