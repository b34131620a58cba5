"""Attention of new tokens over a paged KV cache, through a page table, the new ones included.

  o_BTNH, cache = decode_attention(q_BTNH, new, cache, layer, positions_BT)

The cache of all layers is passed whole and its layer named, so that a loop over layers never slices
it. The query heads of a key head share its loads. `reference`, `xla`, `pallas_tpu` and `pallas_gpu`
compute the same; "auto" takes the first that the device and the case allow, and one that cannot
serve a case refuses it with NotImplementedError.
"""

import dataclasses
from typing import Any

import jax

from qed_kernels.choice import first_that_serves, known, on_tpu
from qed_kernels.decode_attention import pallas_gpu, pallas_tpu, reference, xla

IMPLEMENTATIONS = {
  "reference": reference.decode_attention,
  "xla": xla.decode_attention,
  "pallas_tpu": pallas_tpu.decode_attention,
  "pallas_gpu": pallas_gpu.decode_attention,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """k_LPKSH, v_LPKSH: keys and values by layer, page, key head and offset in the page; values are
  finite. k_scale_LPKS, v_scale_LPKS: float32, what the integers of int8 pages are multiplied by;
  None otherwise. table_BP: int32, the pages of each sequence in order."""

  k_LPKSH: Any
  v_LPKSH: Any
  k_scale_LPKS: Any
  v_scale_LPKS: Any
  table_BP: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
  """Keys and values of T new tokens as they are to be stored, with the scales of int8."""

  k_BTKH: Any
  v_BTKH: Any
  k_scale_BTK: Any
  v_scale_BTK: Any


def decode_attention(
  q_BTNH,
  new: Tokens,
  cache: Cache,
  layer,
  positions_BT,
  *,
  scale: float | None = None,
  implementation: str = "auto",
):
  """Writes T new tokens of every sequence and attends from each to s <= its position.

  positions_BT: int32; a negative one is padding, written nowhere, whose output means nothing. Those
  of a sequence are consecutive, and within the table. Returns o_BTNH in q's dtype, and the cache,
  which is to be donated.
  scale: of the scores, 1 / sqrt(H) unless given.
  """
  scale = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
  arguments = (q_BTNH, new, cache, layer, positions_BT, scale)
  names = candidates(implementation)
  return first_that_serves("decode_attention", IMPLEMENTATIONS, names, *arguments)


def candidates(implementation: str) -> tuple[str, ...]:
  """Names to try, the best first. Raises ValueError, one line, for one that does not exist.

  "auto" leaves a GPU to XLA until tools/gpu_check.py has measured `pallas_gpu` on one.
  """
  if implementation == "auto":
    return ("pallas_tpu", "xla") if on_tpu() else ("xla",)
  return known("decode_attention", implementation, IMPLEMENTATIONS)
