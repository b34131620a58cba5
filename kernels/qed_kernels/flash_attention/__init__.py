"""Causal attention of packed rows: softmax(scale q k) v within segments, forward and backward.

  rows = pack(segments_BT, query_heads, key_heads, head_dim)             once a batch
  o_BTNH, lse_BTN = flash_attention(q_BTNH, k_BSKH, v_BSKH, rows)        in every layer

Query heads share key heads in groups, N = K * G, without K and V being repeated. The T queries are
those of the last T of the S keys, all of them or a share of a row that is split by tokens. Several
implementations compute the same: `reference`, `xla`, `pallas_tpu`, `pallas_gpu`, `cudnn`. "auto"
takes the first that the device and the case allow; what it cannot serve, an implementation refuses
with NotImplementedError.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qed_kernels.choice import first_that_serves, known, on_tpu
from qed_kernels.flash_attention import cudnn, pallas_gpu, pallas_tpu, reference, xla
from qed_kernels.flash_attention.residuals import RESIDUALS as RESIDUALS

IMPLEMENTATIONS = {
  "reference": reference.flash_attention,
  "xla": xla.flash_attention,
  "pallas_tpu": pallas_tpu.flash_attention,
  "pallas_gpu": pallas_gpu.flash_attention,
  "cudnn": cudnn.flash_attention,
}
PLANS = {"pallas_tpu": pallas_tpu.plan, "pallas_gpu": pallas_gpu.plan, "cudnn": cudnn.plan}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedRows:
  """What every layer needs to know of a batch of packed rows.

  start_BT: int32, the first key of each query's segment. Query t is the token of key S - T + t and
    sees the keys start[t] <= s <= S - T + t.
  plan: what the kernels visit, or None where plain XLA will run.
  """

  start_BT: Any
  plan: pallas_tpu.Plan | pallas_gpu.Plan | cudnn.Plan | None


def pack(
  segments_BT, query_heads: int, key_heads: int, head_dim: int, implementation: str = "auto"
) -> PackedRows:
  """Of whole rows. segments_BT: int, equal in neighbouring tokens of a segment; padding is one."""
  T = segments_BT.shape[1]
  return pack_starts(
    segment_starts(segments_BT), T, query_heads, key_heads, head_dim, implementation
  )


def segment_starts(segments_BT):
  """-> start_BT, int32: the first token of each token's segment."""
  changed_BT = segments_BT != jnp.pad(segments_BT, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
  index_BT = jax.lax.broadcasted_iota(jnp.int32, segments_BT.shape, 1)
  return jax.lax.cummax(jnp.where(changed_BT, index_BT, 0), axis=1)


def pack_starts(
  start_BT, keys: int, query_heads: int, key_heads: int, head_dim: int, implementation: str = "auto"
) -> PackedRows:
  """Of the last T of a number of keys. start_BT: int32, as in PackedRows; it never falls."""
  plan = next((PLANS[name] for name in candidates(implementation) if name in PLANS), None)
  if plan is None or query_heads % key_heads:
    return PackedRows(start_BT, None)
  return PackedRows(start_BT, plan(start_BT, keys, query_heads // key_heads, head_dim))


def flash_attention(
  q_BTNH,
  k_BSKH,
  v_BSKH,
  rows: PackedRows,
  *,
  scale: float | None = None,
  implementation: str = "auto",
):
  """-> o_BTNH in q's dtype, and lse_BTN, the natural log of a query's sum of exp(score), float32.

  scale: of the scores, 1 / sqrt(H) unless given. Raises ValueError for an unknown implementation,
  and NotImplementedError where the one that was asked for cannot serve the case.
  """
  scale = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
  arguments = (q_BTNH, k_BSKH, v_BSKH, rows, scale)
  return first_that_serves(
    "flash_attention", IMPLEMENTATIONS, candidates(implementation), *arguments
  )


def candidates(implementation: str) -> tuple[str, ...]:
  """Names to try, the best first. Raises ValueError, one line, for one that does not exist.

  "auto" leaves a GPU to XLA until tools/gpu_check.py has measured `pallas_gpu` on one.
  """
  if implementation == "auto":
    return ("pallas_tpu", "xla") if on_tpu() else ("xla",)
  return known("flash_attention", implementation, IMPLEMENTATIONS)
