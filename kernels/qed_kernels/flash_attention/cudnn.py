"""Flash attention of packed rows by cuDNN, NVIDIA's library, on Hopper GPUs and later.

cuDNN takes a row's segments as lengths and offsets, of a number fixed when a program is compiled. A
batch in which some row has more segments than that is left to plain XLA when it comes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qed_kernels import choice
from qed_kernels.flash_attention import xla

SEGMENTS = 32  # of a row; cuDNN keeps a number for each of them, head and token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
  """Segments of each row in order, M = SEGMENTS of them, -1 for those that do not exist.

  length_BM, offset_Bm: int32; m = M + 1, as cuDNN wants it. fit_B: bool, no segment is left out.
  """

  length_BM: Any
  offset_Bm: Any
  fit_B: Any


def plan(start_BT, keys: int, group: int, head_dim: int) -> Plan:
  """start_BT: int32, of whole rows. Once a batch, for all layers."""
  T = start_BT.shape[1]

  def of_row(start_T):
    first_T = start_T == jnp.arange(T)
    offset_m = jnp.nonzero(first_T, size=SEGMENTS + 1, fill_value=T)[0].astype(jnp.int32)
    length_M = jnp.diff(offset_m)
    return (
      jnp.where(length_M > 0, length_M, -1),
      jnp.where(offset_m < T, offset_m, -1),
      jnp.sum(first_T) <= SEGMENTS,
    )

  return Plan(*jax.vmap(of_row)(start_BT))


def flash_attention(q_BTNH, k_BSKH, v_BSKH, rows, scale: float):
  """As the reference. lse is plain XLA's, which costs nothing where nobody asks for it."""
  limits(q_BTNH, k_BSKH)
  # Private, as jax.nn.dot_product_attention has no packed rows.
  from jax._src.cudnn import fused_attention_stablehlo as fused

  segments = {
    "q_seqlen": rows.plan.length_BM,
    "kv_seqlen": rows.plan.length_BM,
    "q_offsets": rows.plan.offset_Bm,
    "kv_offsets": rows.plan.offset_Bm,
  }
  causal = fused.MaskType.PADDING_CAUSAL  # within each segment

  def packed(q, k, v):
    return fused.dot_product_attention(q, k, v, **segments, scale=scale, mask_type=causal)

  plain = lambda q, k, v: xla.flash_attention(q, k, v, rows, scale)  # noqa: E731
  o_BTNH = jax.lax.cond(
    jnp.all(rows.plan.fit_B), packed, lambda *qkv: plain(*qkv)[0], q_BTNH, k_BSKH, v_BSKH
  )
  return o_BTNH, plain(q_BTNH, k_BSKH, v_BSKH)[1]


def limits(q_BTNH, k_BSKH) -> None:
  """Raises NotImplementedError, one line, for what cuDNN cannot do here."""
  if not choice.on_gpu():
    raise NotImplementedError(f"cudnn: {choice.device().platform} is no GPU")
  if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
    raise NotImplementedError(f"cudnn: {q_BTNH.dtype} is neither bfloat16 nor float16")
  if q_BTNH.shape[1] != k_BSKH.shape[1]:
    raise NotImplementedError("cudnn: the queries are a share of a row")
