"""Cycles of the TPU kernels, counted in the machine code that libtpu compiles: no TPU needed.

libtpu writes the final bundles of every program it compiles; a TensorCore issues one a cycle. Of
the parts of a kernel's loop the two largest are its bodies: that of a tile seen whole, and that of
one with a mask. A step takes at least as many cycles as it has bundles, and as its products keep
the matrix units busy. On real chips kernels took 1.03 to 1.20 times as long as counted so (recorded
times of other kernels; measure / static, shared with this project's notes on kernels).

  make aot && .venv/bin/python tools/tpu_static.py
  .venv/bin/python tools/tpu_static.py --chips v6e --kernels paged_decode

Prints a table; the last line is JSON.
"""

import argparse
import dataclasses
import json
import os
import re
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]
DUMP = Path(tempfile.mkdtemp(prefix="tpu_static_"))
os.environ |= {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-8",
  "TPU_LOG_DIR": "disabled",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={DUMP} --xla_jf_dump_llo_text=true "
  "--xla_jf_dump_llo_pass_label_regex=final.*",
}

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402
from qed_kernels import decode_attention as da  # noqa: E402
from qed_kernels import flash_attention as fa  # noqa: E402
from qed_kernels.flash_attention import pallas_tpu  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Chip:
  """One core: topology, clock in Hz, matrix units and their width, HBM in bytes a second."""

  topology: str
  clock: float
  units: int
  width: int
  hbm: float


CHIPS = {
  "v5e": Chip("v5e:1x1", 1.503e9, 4, 128, 819e9),
  "v5p": Chip("v5p:2x2x1", 1.751e9, 4, 128, 2765e9 / 2),
  "v6e": Chip("v6e:1x1", 1.751e9, 4, 256, 1640e9),
}
N, K, H, T = 32, 8, 128, 4096
PAGE = 256
# An instruction: address, a letter pair where a block starts, a > for each loop around it, slots.
BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(LB|LH|LE|PB|PF|CT)?\s*:\s*((?:>\s*)*)\{(.*)$")


@dataclasses.dataclass
class Region:
  """Bundles between two edges of blocks, and what is in them."""

  depth: int
  bundles: int = 0
  products: int = 0
  spills: int = 0


def regions(text: str) -> list[Region]:
  """Of a program's final bundles, as libtpu prints them."""
  found: list[Region] = []
  for line in text.splitlines():
    if not (match := BUNDLE.match(line)):
      continue
    edge, depth, slots = match[1], match[2].count(">"), match[3]
    if not found or edge or depth != found[-1].depth:
      found.append(Region(depth))
    found[-1].bundles += 1
    found[-1].products += len(re.findall(r"vmatmul", slots))
    found[-1].spills += len(re.findall(r"\bvst [^;]*spill", slots))
  return found


def compile_for(chip: Chip, program, *arguments) -> dict[str, list[Region]]:
  """Compiles for one core -> the regions of each Pallas kernel in it."""
  how = {"chips_per_host_bounds": (1, 1, 1)} if chip.topology.endswith(":1x1") else {}
  described = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology, **how)
  mesh = Mesh(np.array(described.devices[:1]), ("x",))
  place = lambda x: jax.ShapeDtypeStruct(  # noqa: E731
    x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec())
  )
  before = set(DUMP.glob("*-final_bundles.txt"))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    jax.jit(program).lower(*jax.tree.map(place, arguments)).compile()
  kernels: dict[str, list[Region]] = {}
  for path in set(DUMP.glob("*-final_bundles.txt")) - before:
    for name in ("flash_forward", "flash_backward", "paged_decode"):
      if name in path.name and "schedule-analysis" not in path.name and "-TLP-" not in path.name:
        kernels[name] = regions(path.read_text(errors="replace"))
  return kernels


def of(*shape, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def flash(chip: Chip) -> dict[str, dict]:
  """A tile of the forward and of the backward kernel: 1,024 keys, the rows that the chip gets."""

  chosen = []

  def both(q, k, v, segments_BT, do):
    chosen.append(pallas_tpu.blocks(T, T))  # they depend on the chip
    rows = fa.pack(segments_BT, N, K, H)
    attend = lambda *qkv: fa.flash_attention(*qkv, rows, implementation="pallas_tpu")[0]  # noqa: E731
    o, pull = jax.vjp(attend, q, k, v)
    return o, pull(do)

  q, kv, segments_BT = of(1, T, N, H), of(1, T, K, H), of(1, T, dtype=jnp.int32)
  kernels = compile_for(chip, both, q, kv, kv, segments_BT, q)
  blocks, rows = chosen[0], {}
  for name, products in (("flash_forward", 2), ("flash_backward", 5)):
    flops = 2 * products * (N // K) * blocks.query * blocks.key * H
    # A product of depth 128 fills half of a unit that is 256 wide.
    per_cycle = 2 * chip.units * chip.width * min(chip.width, H)
    rows[name] = summary(chip, kernels[name], flops, flops / per_cycle)
  return rows


def decode(chip: Chip) -> dict[str, dict]:
  """A page of 256 tokens with 8 key heads: a MiB of keys and values."""
  B, pages = 16, 257

  def step(q, k, v, k_LPKSH, v_LPKSH, table_BP, positions_B1):
    cache, new = da.Cache(k_LPKSH, v_LPKSH, None, None, table_BP), da.Tokens(k, v, None, None)
    return da.decode_attention(q, new, cache, 0, positions_B1, implementation="pallas_tpu")

  pool, ints = of(1, pages, K, PAGE, H), lambda *shape: of(*shape, dtype=jnp.int32)
  new = (of(B, 1, N, H), of(B, 1, K, H), of(B, 1, K, H))
  kernels = compile_for(chip, step, *new, pool, pool, ints(B, 16), ints(B, 1))
  read = 2 * K * PAGE * H * 2
  row = summary(chip, kernels["paged_decode"], 0, chip.clock * read / chip.hbm)
  return {"paged_decode": row}


def summary(chip: Chip, found: list[Region], flops: float, bound: float) -> dict:
  """The two bodies of the loop, and cycles that the hardware needs whatever the code is."""
  bodies = sorted((r for r in found if r.products), key=lambda r: -r.bundles)[:2]
  masked, whole = bodies[0].bundles, bodies[-1].bundles
  row = {
    "whole": whole,
    "masked": masked,
    "bound_cycles": round(bound),
    "spills": sum(region.spills for region in found),
  }
  if flops:
    row["tflops"] = round(flops / max(whole, bound) * chip.clock / 1e12, 1)
  return row


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
  parser.add_argument("--kernels", nargs="+", choices=("flash", "paged_decode"), default=None)
  args = parser.parse_args()
  wanted = args.kernels or ["flash", "paged_decode"]
  result = {}
  head = ("chip", "kernel", "whole", "masked", "bound", "spills", "TF/s")
  print("{:<6}{:<16}{:>8}{:>8}{:>8}{:>8}{:>8}".format(*head))
  for name in args.chips:
    chip = CHIPS[name]
    rows = (flash(chip) if "flash" in wanted else {}) | (
      decode(chip) if "paged_decode" in wanted else {}
    )
    for kernel, row in rows.items():
      print(
        f"{name:<6}{kernel:<16}{row['whole']:>8,}{row['masked']:>8,}{row['bound_cycles']:>8,}"
        f"{row['spills']:>8,}{row.get('tflops', '-'):>8}",
        flush=True,
      )
    result[name] = rows
  print(json.dumps({"cycles": result, "jax": jax.__version__}))
  return 0


if __name__ == "__main__":
  sys.exit(main())
