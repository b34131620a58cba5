"""The Hopper kernels on a Hopper GPU: errors against the reference, speed against cuDNN and copies.

  python tools/gpu_kernels.py        # tools/gpu_check.py runs it too, with a limit on its time

Prints a table; the last line is JSON. Flash attention in TFLOP/s of the pairs that are seen, beside
jax's cuDNN and, where torch is installed, its scaled_dot_product_attention; decode attention as a
share of the bandwidth of a copy measured here. Exit code 1 when an error is over its limit.
"""

import dataclasses
import functools
import importlib.util
import itertools
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]

from qed_kernels import decode_attention as da  # noqa: E402
from qed_kernels import flash_attention as fa  # noqa: E402
from qed_kernels import hopper  # noqa: E402
from qed_kernels.decode_attention import shapes as decode_shapes  # noqa: E402
from qed_kernels.flash_attention.shapes import Shape  # noqa: E402

LIMITS = {"o": 5e-3, "lse": 5e-3, "dq": 1e-2, "dk": 1e-2, "dv": 1e-2}
EXACT = {"packed": Shape(1, 2048, 32, 8, 128, 5), "small heads": Shape(2, 1111, 8, 2, 64, 3)}
DENSE = {f"dense {T // 1024}k": Shape(1, T, 32, 8, 128, 1) for T in (4096, 16_384, 49_152)}
TIMED = DENSE | {"packed 16k": Shape(1, 16_384, 32, 8, 128, 8)}
DECODED = {name: decode_shapes.REAL[name] for name in ("64 x 4k", "16 x 32k")}


def seconds(function, *arguments, calls: int = 10) -> float:
  """Wall time of a call among `calls` that are dispatched together; the median of five times."""
  jax.block_until_ready(function(*arguments))
  times = []
  for _ in range(5):
    began = time.perf_counter()
    for _ in range(calls):
      result = function(*arguments)
    jax.block_until_ready(result)
    times.append((time.perf_counter() - began) / calls)
  return float(np.median(times))


def draw(shape: Shape):
  """q, k, v, do in bf16 and segments of equal length."""
  sizes = [(shape.B, shape.T, heads, shape.H) for heads in (shape.N, shape.K, shape.K, shape.N)]
  keys = jax.random.split(jax.random.key(0), 4)
  arrays = [
    jax.random.normal(key, size, jnp.bfloat16) for key, size in zip(keys, sizes, strict=True)
  ]
  length = -(-shape.T // shape.segments)
  return arrays, jnp.tile(jnp.arange(shape.T) // length, (shape.B, 1))


def values(name: str, q, k, v, do, segments_BT):
  """o, lse, dq, dk, dv of an implementation."""
  rows = fa.pack(segments_BT, q.shape[2], k.shape[2], q.shape[3], name)
  (o, lse), pull = jax.vjp(
    lambda *x: fa.flash_attention(*x, rows, implementation=name), q, k, v
  )  # fmt: skip
  return o, lse, *pull((do.astype(o.dtype), jnp.ones_like(lse)))


def flash_errors() -> dict:
  """||x - reference|| / ||reference||, the reference in float32 with full products."""
  found = {}
  for (case, shape), implementation in itertools.product(EXACT.items(), ("pallas_gpu", "cudnn")):
    arrays, segments_BT = draw(shape)
    program = jax.jit(functools.partial(values, implementation))
    ours, again = (program(*arrays, segments_BT) for _ in range(2))
    with jax.default_matmul_precision("highest"):
      wide = [x.astype(jnp.float32) for x in arrays]
      theirs = jax.jit(functools.partial(values, "reference"))(*wide, segments_BT)
    for name, x, y in zip(LIMITS, ours, theirs, strict=True):
      error = jnp.linalg.norm((x.astype(jnp.float32) - y).ravel()) / jnp.linalg.norm(y.ravel())
      found[f"flash {case} {implementation} error of {name}"] = float(error)
    if implementation == "pallas_gpu":
      same = all(bool((x == y).all()) for x, y in zip(ours, again, strict=True))
      found[f"flash {case} same bits twice"] = same
  return found


def attention(name: str, segments_BT, shape: Shape):
  """q, k, v -> o."""
  if name == "cudnn" and shape.segments == 1:
    return functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
  rows = fa.pack(segments_BT, shape.N, shape.K, shape.H, name)
  return lambda q, k, v: fa.flash_attention(q, k, v, rows, implementation=name)[0]


def flash_speed() -> dict:
  """TFLOP/s forward, and of the backward pass as the rest of both."""
  found = {}
  for case, shape in TIMED.items():
    (q, k, v, do), segments_BT = draw(shape)
    pairs = shape.T**2 / 2 / shape.segments
    work = 4 * shape.B * shape.N * shape.H * pairs
    for name in ("pallas_gpu", "cudnn"):
      attend = attention(name, segments_BT, shape)

      def both(q, k, v, do, attend=attend):
        return jax.vjp(attend, q, k, v)[1](do)

      forward = seconds(jax.jit(attend), q, k, v)
      backward = seconds(jax.jit(both), q, k, v, do) - forward
      found[f"flash {case} {name} forward TFLOP/s"] = work / forward / 1e12
      found[f"flash {case} {name} backward TFLOP/s"] = 2.5 * work / backward / 1e12
      found[f"flash {case} {name} forward ms"] = 1e3 * forward
    for way in ("forward", "backward"):
      peer = found.get(f"flash {case} cudnn {way} TFLOP/s")
      if peer:
        ours = found[f"flash {case} pallas_gpu {way} TFLOP/s"]
        found[f"flash {case} {way} against cudnn"] = ours / peer
  packed, dense = (found[f"flash {x} 16k pallas_gpu forward ms"] for x in ("packed", "dense"))
  return found | {"flash 8 segments against dense 16k": dense / packed}


def torch_speed() -> dict:
  """PyTorch's attention at the dense shapes, forward, where torch sees the GPU."""
  if importlib.util.find_spec("torch") is None:
    return {"torch": "not installed"}
  import torch
  from torch.nn.functional import scaled_dot_product_attention

  if not torch.cuda.is_available() or torch.__version__ < "2.5":
    return {"torch": f"{torch.__version__} sees no GPU, or is older than 2.5"}
  found = {}
  for case, shape in DENSE.items():
    q, k, v = (
      torch.randn(1, heads, shape.T, shape.H, dtype=torch.bfloat16, device="cuda")
      for heads in (shape.N, shape.K, shape.K)
    )

    def run(q=q, k=k, v=v):
      for _ in range(10):
        scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
      torch.cuda.synchronize()

    run()
    began = time.perf_counter()
    run()
    took = (time.perf_counter() - began) / 10
    found[f"flash {case} torch forward TFLOP/s"] = 2 * shape.N * shape.H * shape.T**2 / took / 1e12
  return found


def decode_inputs(shape: decode_shapes.Shape, dtype: str, T: int = 1):
  """A cache of one layer, the newest T tokens of each sequence to be written."""
  B, length, N, K, H, page = dataclasses.astuple(shape)
  keys, pages = jax.random.split(jax.random.key(0), 5), B * length // page
  if dtype == "int8":
    numbers = lambda key, *shape: jax.random.randint(key, shape, -127, 128, jnp.int8)  # noqa: E731
    scales = lambda *shape: jnp.full(shape, 0.01)  # noqa: E731
  else:
    numbers = lambda key, *shape: jax.random.normal(key, shape, jnp.bfloat16)  # noqa: E731
    scales = lambda *shape: None  # noqa: E731
  cache = da.Cache(
    *(numbers(keys[i], 1, pages, K, page, H) for i in (0, 1)),
    *(scales(1, pages, K, page) for _ in range(2)),
    jax.random.permutation(keys[2], pages).reshape(B, -1).astype(jnp.int32),
  )
  new = da.Tokens(*(numbers(keys[i], B, T, K, H) for i in (3, 4)), scales(B, T, K), scales(B, T, K))
  q = jax.random.normal(keys[2], (B, T, N, H), jnp.bfloat16)
  return q, new, cache, jnp.full((B, T), length - T, jnp.int32) + jnp.arange(T)


def decode() -> dict:
  """Errors against float32 XLA at a small size, and the share of a copy's bandwidth."""
  found = {}
  run = lambda name, q, new, cache, at: da.decode_attention(  # noqa: E731
    q, new, cache, 0, at, implementation=name
  )
  for dtype, T in itertools.product(("bfloat16", "int8"), (1, 3)):
    q, new, cache, at = decode_inputs(decode_shapes.Shape(4, 4096), dtype, T)
    # A whole sequence, a part of one, one that has only just begun, and a free slot.
    lengths_B1 = jnp.array([[4096], [500], [T], [0]])
    at = jnp.where(lengths_B1 > 0, lengths_B1 - T + jnp.arange(T), -1).astype(jnp.int32)
    ours = jax.jit(functools.partial(run, "pallas_gpu"))(q, new, cache, at)[0][:3]
    with jax.default_matmul_precision("highest"):
      theirs = jax.jit(functools.partial(run, "xla"))(q.astype(jnp.float32), new, cache, at)[0][:3]
    error = jnp.linalg.norm((ours.astype(jnp.float32) - theirs).ravel())
    found[f"decode {dtype} {T} new error of o"] = float(error / jnp.linalg.norm(theirs.ravel()))
  x = jnp.ones((2**30,), jnp.bfloat16)
  bandwidth = 2 * x.nbytes / seconds(jax.jit(lambda x: x + 1), x)
  del x
  found["copy TB/s"] = bandwidth / 1e12
  for case, shape in DECODED.items():
    took = {}
    for dtype in ("bfloat16", "int8"):
      q, new, cache, at = decode_inputs(shape, dtype)
      step = jax.jit(functools.partial(run, "pallas_gpu"), donate_argnums=2)
      _, cache = step(q, new, cache, at)
      jax.block_until_ready(cache)
      times = []
      for _ in range(5):
        began = time.perf_counter()
        for _ in range(10):
          o, cache = step(q, new, cache, at)
        jax.block_until_ready(o)
        times.append((time.perf_counter() - began) / 10)
      took[dtype] = float(np.median(times))
      read = sum(x.nbytes for x in jax.tree.leaves(cache)) - cache.table_BP.nbytes
      share = read / took[dtype] / bandwidth
      found[f"decode {case} {dtype} share of copy bandwidth"] = share
      del cache
    found[f"decode {case} int8 against bf16"] = took["bfloat16"] / took["int8"]
  return found


def main() -> int:
  device = jax.devices()[0]
  try:
    if device.platform != "gpu":
      raise NotImplementedError(f"the default device is {device.platform}")
    hopper.interpreter("pallas_gpu")
  except NotImplementedError as error:
    print(f"error: this needs a Hopper GPU: {error}", file=sys.stderr)
    return 2
  found, failed = {"device": device.device_kind, "jax": jax.__version__}, []
  for part in (flash_errors, decode, flash_speed, torch_speed):
    try:
      values = part()
    except Exception as error:  # one part that a chip cannot do must not hide the others
      failed.append(f"{part.__name__}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
      print(f"{failed[-1]}", flush=True)
      continue
    for key, value in values.items():
      print(f"| {key} | {value:.4g} |" if isinstance(value, float) else f"| {key} | {value} |")
      limit = LIMITS[key.split()[-1]] if " error of " in key else None
      if limit is not None and not value <= limit:
        failed.append(f"{key} is {value:.3g}, over {limit}")
      if value is False:
        failed.append(f"{key}: no")
    sys.stdout.flush()
    found |= values
  print(json.dumps(found | {"failed": failed}))
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())
