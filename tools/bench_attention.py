"""Our plain XLA attention beside jax.nn.dot_product_attention, in one run on this device.

  python tools/bench_attention.py                     # causal rows at a few lengths
  python tools/bench_attention.py --lengths 1024 --heads 8 --key-heads 2 --head-dim 64

For each length: median milliseconds forward, and forward + backward, the two in turns; theirs over
ours (over 1: ours is faster); MiB of temporary memory that XLA sets aside. The last line is JSON.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1] / "kernels")]

from qed_kernels import flash_attention as fa  # noqa: E402


def programs(length: int, heads: int, key_heads: int, head_dim: int) -> dict:
  """name -> (forward, forward + backward), compiled for one causal row, and their arguments."""
  keys = jax.random.split(jax.random.key(0), 3)
  q = jax.random.normal(keys[0], (1, length, heads, head_dim), jnp.float32)
  k, v = (jax.random.normal(key, (1, length, key_heads, head_dim), jnp.float32) for key in keys[1:])
  rows = fa.pack(jnp.ones((1, length), jnp.int32), heads, key_heads, head_dim, "xla")
  attend = {
    "qed_jax": lambda q, k, v: fa.flash_attention(q, k, v, rows, implementation="xla")[0],
    "jax": lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True),
  }

  def compiled(function):
    gradient = jax.grad(lambda *x: jnp.sum(function(*x) ** 2), argnums=(0, 1, 2))
    return [jax.jit(f).lower(q, k, v).compile() for f in (function, gradient)]

  return {name: compiled(function) for name, function in attend.items()}, (q, k, v)


def milliseconds(program, arguments) -> float:
  began = time.perf_counter()
  jax.block_until_ready(program(*arguments))
  return 1e3 * (time.perf_counter() - began)


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 2048, 4096, 8192])
  parser.add_argument("--heads", type=int, default=8)
  parser.add_argument("--key-heads", type=int, default=2)
  parser.add_argument("--head-dim", type=int, default=64)
  parser.add_argument("--repeats", type=int, default=7)
  args = parser.parse_args()
  result = {}
  print("| tokens | pass | ours, ms | jax, ms | theirs / ours | ours, MiB | jax, MiB |")
  print("|---|---|---|---|---|---|---|")
  for length in args.lengths:
    compiled, arguments = programs(length, args.heads, args.key_heads, args.head_dim)
    for i, part in enumerate(("forward", "both")):
      both = {name: pair[i] for name, pair in compiled.items()}
      times = {name: [] for name in both}
      for turn in range(args.repeats + 1):
        for name, program in both.items():
          took = milliseconds(program, arguments)
          if turn:  # the first one warms up
            times[name].append(took)
      took = {name: float(np.median(x)) for name, x in times.items()}
      ratio = float(np.median(np.divide(times["jax"], times["qed_jax"])))
      memory = {
        name: program.memory_analysis().temp_size_in_bytes / 2**20 for name, program in both.items()
      }
      result[f"{length} {part}"] = {"ratio": ratio, "ms": took, "temporary_mib": memory}
      print(
        f"| {length:,} | {part} | {took['qed_jax']:.1f} | {took['jax']:.1f} | {ratio:.2f} "
        f"| {memory['qed_jax']:.0f} | {memory['jax']:.0f} |",
        flush=True,
      )
  print(json.dumps({"device": jax.devices()[0].device_kind, "lengths": result}))
  return 0


if __name__ == "__main__":
  sys.exit(main())
