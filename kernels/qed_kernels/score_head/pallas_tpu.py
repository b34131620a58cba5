"""The scoring head on a TPU: one forward and one backward kernel, whose logits never leave VMEM.

Both hold a group of tokens in VMEM and stream the head past it, a block of the vocabulary at a
time; a step is one tile of them, its logits transposed, [vocabulary, tokens], so that what is known
of a token is a lane vector. The forward pass keeps of a token the largest logit so far, the sum of
exp, that of exp times logit, and the target's logit, the logits taken below the largest. The
backward pass makes the logits once more, and from them in the same step the gradients of the tokens
(summed in VMEM over the vocabulary) and of the block (over the group; over groups in HBM, in
float32): three products, and with the forward pass four, which is what there must be. The order of
all sums is fixed: gradients are the same to the bit from run to run.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qed_kernels import choice

LANES = 128
WIDEST = {jnp.dtype("bfloat16"): 5120, jnp.dtype("float32"): 1024}  # what fits the VMEM of a v5p
UNSEEN = -1e30
LOG2E = math.log2(math.e)
X_XT = (((1,), (1,)), ((), ()))  # products of two matrices: which dimension of each is summed
X_X = (((1,), (0,)), ((), ()))
XT_X = (((0,), (0,)), ((), ()))
SCALAR = pl.BlockSpec(memory_space=pltpu.SMEM)


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Tokens held at once, tokens and vocabulary of a tile, bytes of VMEM; halves of the vocabulary
  that the backward pass visits side by side."""

  group: int
  tokens: int
  vocabulary: int
  vmem: int
  halves: int


def blocks(M: int, V: int, D: int, itemsize: int) -> Blocks:
  """For M tokens of width D. Measured with tools/tpu_static.py."""
  kind = choice.device().device_kind
  tokens = min(512, -(-M // LANES) * LANES)
  # Each group reads the head once and, backward, reads and writes its gradient in float32. Behind
  # the products of 1,024 tokens that is hidden, but not behind the faster ones of a v6e.
  most, vmem = (2048, 112 << 20) if kind.startswith("TPU v6") else (1024, 60 << 20)
  most = max(1, most * 2560 * 2 // (D * itemsize) // tokens)  # tiles
  tiles = -(-M // tokens)
  group = tokens * -(-tiles // -(-tiles // most))
  vocabulary = min(256, -(-V // LANES) * LANES)
  # The two cores of a v5p take a half each.
  halves = 2 if kind == "TPU v5" and V > vocabulary else 1
  return Blocks(group, tokens, vocabulary, vmem, halves)


def score_head(x_BTD, w_VD, target_BT, temperature, chunk: int, pin, frozen: bool):
  """As the reference, in float32. The chunks of the XLA implementation mean nothing here."""
  limits(x_BTD, pin)
  B, T, D = x_BTD.shape
  b = blocks(B * T, w_VD.shape[0], D, x_BTD.dtype.itemsize)
  pad = -(B * T) % b.group
  x_MD = jnp.pad(x_BTD.reshape(-1, D), ((0, pad), (0, 0)))
  target_M = jnp.pad(target_BT.reshape(-1), (0, pad))
  temperature = jnp.asarray(temperature, jnp.float32)
  out = score(not choice.on_tpu(), b, frozen, temperature, x_MD, w_VD, target_M)
  return tuple(x_M[: B * T].reshape(B, T) for x_M in out)


def limits(x_BTD, pin) -> None:
  """Raises NotImplementedError, one line, for what the kernels cannot do."""
  if pin is not None:
    raise NotImplementedError("pallas_tpu: the head is spread over several devices")
  D, dtype = x_BTD.shape[2], x_BTD.dtype
  if D % LANES:
    raise NotImplementedError(f"pallas_tpu: width {D} is no multiple of {LANES}")
  if D > WIDEST.get(dtype, 0):
    known = " or ".join(f"{width} in {dtype}" for dtype, width in WIDEST.items())
    raise NotImplementedError(f"pallas_tpu: width {D} in {dtype}; at most {known}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def score(interpret: Any, b: Blocks, frozen: bool, temperature, x_MD, w_VD, target_M):
  """logp_M and entropy_M of padded tokens. frozen: no gradient of w_VD is made."""
  return score_forward(interpret, b, frozen, temperature, x_MD, w_VD, target_M)[0]


def score_forward(interpret, b, frozen, temperature, x_MD, w_VD, target_M):
  out = forward(interpret, b, LOG2E / temperature, x_MD, w_VD.astype(x_MD.dtype), target_M)
  logp_M, entropy_M, lse2_M = (x_G1g.reshape(-1) for x_G1g in out)
  return (logp_M, entropy_M), (temperature, x_MD, w_VD, target_M, entropy_M, lse2_M)


def score_backward(interpret, b, frozen, kept, cotangents):
  """d logp / d z = [target] - p, and d entropy / d z = -p (log p + entropy)."""
  temperature, x_MD, w_VD, target_M, entropy_M, lse2_M = kept
  dlogp_M, dentropy_M = cotangents
  # By what 1, log2 p and [target] are multiplied in d logit.
  factors = (dlogp_M + dentropy_M * entropy_M, dentropy_M / LOG2E, dlogp_M)
  factors_M = [factor_M / temperature for factor_M in factors]
  w_low_VD = w_VD.astype(x_MD.dtype)
  step = functools.partial(backward, interpret, b, LOG2E / temperature, w_low_VD)
  groups = lambda x_M: x_M.reshape(-1, b.group, *x_M.shape[1:])  # noqa: E731
  tokens = [groups(x_M) for x_M in (x_MD, target_M, lse2_M, *factors_M)]
  zeros_VD = None if frozen else jnp.zeros(w_VD.shape, jnp.float32)
  dw_VD, dx_Ggd = lax.scan(step, zeros_VD, tokens)
  dw_VD = jnp.zeros_like(w_VD) if frozen else dw_VD.astype(w_VD.dtype)
  return None, dx_Ggd.reshape(x_MD.shape), dw_VD, None


score.defvjp(score_forward, score_backward)


def dot(x, y, dims):
  """A product of two matrices into float32; float32 ones in full."""
  full = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return lax.dot_general(x, y, dims, precision=full, preferred_element_type=jnp.float32)


def each_block(V: int, block: int, index, body) -> None:
  """body(rows that exist, or None for all), compiled twice: only the last block pays for a mask.

  Nothing is called for an index past the last.
  """
  last = pl.cdiv(V, block) - 1
  whole = last if V % block else last + 1
  pl.when(index < whole)(lambda: body(None))
  if V % block:
    pl.when(index == last)(lambda: body(V % block))


def rows_below(shape, count: int):
  return lax.broadcasted_iota(jnp.int32, shape, 0) < count


# --- forward -----------------------------------------------------------------------------------


def forward(interpret, b: Blocks, scale, x_MD, w_VD, target_M):
  """scale: of the logits, to base 2. -> logp, entropy and lse in base 2: [groups, tiles, 1, t]."""
  (M, D), V = x_MD.shape, w_VD.shape[0]
  tiles = b.group // b.tokens
  rows = pl.BlockSpec((None, tiles, 1, b.tokens), lambda g, v, t: (g, 0, 0, 0))
  shape = (M // b.group, tiles, 1, b.tokens)
  return pl.pallas_call(
    functools.partial(forward_kernel, b=b, V=V),
    name="score_forward",
    grid=(M // b.group, pl.cdiv(V, b.vocabulary), tiles),
    in_specs=[
      pl.BlockSpec((b.group, D), lambda g, v, t: (g, 0)),
      pl.BlockSpec((b.vocabulary, D), lambda g, v, t: (v, 0)),
      rows,
      SCALAR,
    ],
    out_specs=[rows] * 3,
    out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32)] * 3,
    scratch_shapes=[pltpu.VMEM((tiles, 4, b.tokens), jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=b.vmem
    ),
    cost_estimate=cost(x_MD, w_VD, 1, M // b.group),
    interpret=interpret,
  )(x_MD, w_VD, target_M.reshape(shape), scale.reshape(1))


def cost(x_MD, w_VD, products: int, reads: int):
  """What XLA's scheduler is told."""
  M, D = x_MD.shape
  V = w_VD.shape[0]
  return pl.CostEstimate(
    flops=2 * products * M * V * D,
    transcendentals=M * V,
    bytes_accessed=(M * D + reads * V * D) * x_MD.dtype.itemsize,
  )


def forward_kernel(
  x_ref, w_ref, target_ref, scale_ref, logp_ref, entropy_ref, lse_ref, sums_ref,
  *, b: Blocks, V: int,
):  # fmt: skip
  """One tile: logits, and the four sums so far."""
  v, t = pl.program_id(1), pl.program_id(2)

  @pl.when(v == 0)
  def _():
    sums_ref[t, 0:1] = jnp.full((1, b.tokens), UNSEEN, jnp.float32)
    sums_ref[t, 1:4] = jnp.zeros((3, b.tokens), jnp.float32)

  def body(count) -> None:
    x_td = x_ref[pl.ds(pl.multiple_of(t * b.tokens, b.tokens), b.tokens), :]
    z_vt = dot(w_ref[...], x_td, X_XT) * scale_ref[0]
    if count is not None:
      z_vt = jnp.where(rows_below(z_vt.shape, count), z_vt, UNSEEN)
    before_1t, sum_1t = sums_ref[t, 0:1], sums_ref[t, 1:2]
    largest_1t = jnp.maximum(before_1t, jnp.max(z_vt, axis=0, keepdims=True))
    below_vt, fell_1t = z_vt - largest_1t, before_1t - largest_1t
    e_vt, shrink_1t = jnp.exp2(below_vt), jnp.exp2(fell_1t)
    moments_1t = shrink_1t * (sums_ref[t, 2:3] + fell_1t * sum_1t)
    hit_vt = lax.broadcasted_iota(jnp.int32, z_vt.shape, 0) == target_ref[t] - v * b.vocabulary
    sums_ref[t, 0:1] = largest_1t
    sums_ref[t, 1:2] = shrink_1t * sum_1t + jnp.sum(e_vt, axis=0, keepdims=True)
    sums_ref[t, 2:3] = moments_1t + jnp.sum(e_vt * below_vt, axis=0, keepdims=True)
    sums_ref[t, 3:4] += jnp.sum(jnp.where(hit_vt, z_vt, 0), axis=0, keepdims=True)

  each_block(V, b.vocabulary, v, body)

  @pl.when(v == pl.num_programs(1) - 1)
  def _():
    largest_1t, sum_1t, moment_1t, own_1t = (sums_ref[t, i : i + 1] for i in range(4))
    log2_1t = jnp.log2(sum_1t)
    logp_ref[t] = (own_1t - largest_1t - log2_1t) / LOG2E
    entropy_ref[t] = (log2_1t - moment_1t / sum_1t) / LOG2E
    lse_ref[t] = largest_1t + log2_1t


# --- backward ----------------------------------------------------------------------------------


def backward(interpret, b: Blocks, scale, w_VD, dw_VD, tokens):
  """A group's part of the gradients -> dw_VD with it added, in place, and dx_gd.

  dw_VD: None where none is wanted: a third of the products, and the array, are then left out.
  tokens: x_gd, target_g, lse_g in base 2, and the three factors of d logit.
  """
  x_gd, target_g, *rows_g = tokens
  V, D = w_VD.shape
  tiles, steps = b.group // b.tokens, pl.cdiv(V, b.vocabulary * b.halves)
  last = pl.cdiv(V, b.vocabulary) - 1
  # A half may have a block more than there are: it visits the last one again, and adds nothing.
  block = lambda h, v: jnp.minimum(h * steps + v, last)  # noqa: E731
  vocabulary = pl.BlockSpec((b.vocabulary, D), lambda h, v, t: (block(h, v), 0))
  rows = pl.BlockSpec((tiles, 1, b.tokens), lambda h, v, t: (0, 0, 0))
  frozen = dw_VD is None
  dw = [] if frozen else [dw_VD]
  *dw_after, dx_hgd = pl.pallas_call(
    functools.partial(backward_kernel, b=b, V=V, frozen=frozen),
    name="score_backward",
    grid=(b.halves, steps, tiles),
    in_specs=[
      pl.BlockSpec((b.group, D), lambda h, v, t: (0, 0)),
      vocabulary,
      *[vocabulary] * len(dw),
      *[rows] * 5,
      SCALAR,
    ],
    out_specs=[
      *[vocabulary] * len(dw),
      pl.BlockSpec((None, b.group, D), lambda h, v, t: (h, 0, 0)),
    ],
    out_shape=[*dw, jax.ShapeDtypeStruct((b.halves, b.group, D), x_gd.dtype)],
    scratch_shapes=[pltpu.VMEM((b.group, D), jnp.float32)],
    input_output_aliases={} if frozen else {2: 0},
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=b.vmem
    ),
    cost_estimate=cost(x_gd, w_VD, *((2, 1) if frozen else (3, 5))),
    interpret=interpret,
  )(
    x_gd, w_VD, *dw,
    *(x_g.reshape(tiles, 1, b.tokens) for x_g in (target_g, *rows_g)),
    scale.reshape(1),
  )  # fmt: skip
  if frozen:
    # With one output XLA would fuse the kernel with what stores it, and forget its limit of VMEM.
    dx_hgd = lax.optimization_barrier(dx_hgd)
  dx_gd = jnp.sum(dx_hgd, axis=0) if b.halves > 1 else dx_hgd[0]
  return None if frozen else dw_after[0], dx_gd


def backward_kernel(
  x_ref, w_ref, *refs, b: Blocks, V: int, frozen: bool,
):  # fmt: skip
  """One tile: logits again, d logits, and the product or, with that for dw, two with them.

  refs: of dw before, where it is wanted; targets; lse; the factors of d logit, which are of one,
  logp and hit; the scale; dw; dx; dx summed.
  """
  dw_before_ref, refs = (None, refs) if frozen else (refs[0], refs[1:])
  target_ref, lse_ref, one_ref, logp_ref, hit_ref, scale_ref, *refs = refs
  dw_ref, dx_ref, dx_sum_ref = (None, *refs) if frozen else refs
  v, t = pl.program_id(1), pl.program_id(2)
  block = pl.program_id(0) * pl.num_programs(1) + v
  part = pl.ds(pl.multiple_of(t * b.tokens, b.tokens), b.tokens)

  @pl.when(v == 0)
  def _():
    dx_sum_ref[part, :] = jnp.zeros((b.tokens, dx_sum_ref.shape[1]), jnp.float32)

  if not frozen:

    @pl.when((t == 0) & (block * b.vocabulary < V))
    def _():
      dw_ref[...] = dw_before_ref[...]

  def body(count) -> None:
    x_td, w_vd = x_ref[part, :], w_ref[...]
    if count is not None:
      # What lies past the end may be anything, and zero times anything is not always zero.
      w_vd = jnp.where(rows_below(w_vd.shape, count), w_vd, 0)
    logp_vt = dot(w_vd, x_td, X_XT) * scale_ref[0] - lse_ref[t]
    if count is not None:
      logp_vt = jnp.where(rows_below(logp_vt.shape, count), logp_vt, UNSEEN)
    first = block * b.vocabulary
    hit_vt = lax.broadcasted_iota(jnp.int32, logp_vt.shape, 0) == target_ref[t] - first
    dz_vt = jnp.where(hit_vt, hit_ref[t], 0) - jnp.exp2(logp_vt) * (
      one_ref[t] + logp_ref[t] * logp_vt
    )
    dz_vt = dz_vt.astype(x_td.dtype)
    if not frozen:
      dw_ref[...] += dot(dz_vt, x_td, X_X)
    dx_sum_ref[part, :] += dot(dz_vt, w_vd, XT_X)

  each_block(V, b.vocabulary, block, body)

  @pl.when(v == pl.num_programs(1) - 1)
  def _():
    dx_ref[part, :] = dx_sum_ref[part, :].astype(dx_ref.dtype)
