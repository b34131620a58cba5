"""What the kernels for Hopper GPUs share: operands, products, rings of copies (Mosaic GPU).

A block of threads is a few warpgroups of 128 threads: consumers that compute, and a producer that
has the copy engine (TMA) fill a ring of slots in shared memory ahead of them. wgmma multiplies
64-row matrices there, or one in registers by one there, into registers.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mg

from qed_kernels import choice

MATRIX = mg.Layout.WGMMA  # of an accumulator in the registers of a warpgroup
ROW, COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)  # of a number for each of its rows or columns
CONSUMER, PRODUCER = 240, 24  # registers a thread; with two consumers all that there are
ROWS = 64  # of a wgmma
# Of scores that are not seen. -inf, since a product with the scale and a difference may be one
# operation of one rounding: of a large number that rounding alone can be too much for exp2.
UNSEEN = -float("inf")
LOWEST = -1e30  # what a running maximum begins with: finite, so that its differences are numbers
LOAD_TAKES_INDEX = "idx" in inspect.signature(mg.load).parameters  # until jax 0.11


def interpreter(name: str):
  """None on a Hopper GPU, for which kernels are compiled; on a CPU, jax's interpreter of them.

  Raises NotImplementedError, one line, where neither is to be had.
  """
  device = choice.device()
  if device.platform != "cpu":
    if choice.on_gpu() and any(chip in device.device_kind for chip in ("H100", "H800", "H20")):
      return None
    raise NotImplementedError(f"{name}: {device.device_kind} is not a Hopper GPU")
  if hasattr(mg, "InterpretGPUParams"):
    return mg.InterpretGPUParams()
  raise NotImplementedError(f"{name}: jax {jax.__version__} interprets no such kernel, 0.11 does")


def operand(*shape):
  """Shared memory that wgmma reads: tiles of 8 x 64, their rows swizzled over 128 bytes."""
  return mg.SMEM(
    shape, jnp.bfloat16, transforms=(mg.TilingTransform((8, 64)), mg.SwizzleTransform(128))
  )


def barriers(number: int, arrivals: int = 1):
  return mg.Barrier(num_barriers=number, num_arrivals=arrivals)


def load(ref, layout, optimized: bool = False):
  """The values of a ref, spread over registers as `layout` says."""
  index = ((),) if LOAD_TAKES_INDEX else ()
  return mg.load(ref, *index, layout=layout, optimized=optimized)


def full(shape, value, layout):
  return mg.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def index(shape, axis: int):
  """int32: the row (axis 0) or column of each element of an accumulator."""
  return mg.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX)


def rows(x, shape):
  """A number for each row, [R] -> [R, C]."""
  return lax.broadcast_in_dim(x, shape, [0])


def columns(x, shape):
  """A number for each column, [C] -> [R, C]."""
  return lax.broadcast_in_dim(x, shape, [1])


def transposed(ref):
  return ref.transpose((1, 0))


def product(x_ref, y_ref, meanwhile=None):
  """x y of two refs in shared memory, float32. meanwhile: called while it is under way."""

  def multiply(accumulator):
    mg.wgmma(accumulator, x_ref, y_ref)
    if meanwhile is not None:
      meanwhile()
    return accumulator[...]

  shape = (x_ref.shape[0], y_ref.shape[1])
  return pl.run_scoped(multiply, mg.ACC(shape, jnp.float32))


def add_product(total, x, y_ref, interpret, meanwhile=lambda: None):
  """total + x y, x in registers and y in shared memory. meanwhile: called while it is under way."""

  def multiply(accumulator):
    mg.wgmma(accumulator, x, y_ref)
    meanwhile()

  if interpret is None:
    return pl.run_state(multiply)(mg.ACC.init(total))
  # The interpreter has neither such accumulators nor a factor in registers, and reads that are not
  # wgmma's have to be fenced off from the copies to come.
  y = y_ref[...].astype(jnp.float32)
  mg.commit_smem()
  meanwhile()
  return total + jnp.dot(x.astype(jnp.float32), y)


def produce(first, last, slots: int, streams) -> None:
  """Fills the slots of rings for steps first <= i < last, each as soon as it has been freed.

  streams: (copies, full, free), copies(i) -> [(source, ring)]: what arrives at the barriers `full`.
  Ends when every slot has been freed, so that no barrier is left half-way.
  """

  @pl.loop(first, last)
  def _(i):
    slot = lax.rem(i - first, slots)
    for copies, full, free in streams:
      pl.when(i - first >= slots)(functools.partial(mg.barrier_wait, free.at[slot]))
      for source, ring in copies(i):
        mg.copy_gmem_to_smem(source, ring.at[slot], full.at[slot])

  @pl.loop(lax.max(first, last - slots), last)
  def _(i):
    for _, _, free in streams:
      mg.barrier_wait(free.at[lax.rem(i - first, slots)])


def call(kernel, name: str, interpret, *, grid: dict, outputs, scratch, warpgroups: int):
  """kernel(*refs) for each point of a named grid, once in each warpgroup of axis "warpgroup"."""

  def named(*refs):
    kernel(*refs)

  named.__name__ = name  # what profilers and ptxas call it
  return mg.kernel(
    named,
    out_type=outputs,
    grid=tuple(grid.values()),
    grid_names=tuple(grid),
    num_threads=warpgroups,
    thread_name="warpgroup",
    scratch_types=scratch,
    compiler_params=mg.CompilerParams(approx_math=True),
    **({} if interpret is None else {"interpret": interpret}),
  )
