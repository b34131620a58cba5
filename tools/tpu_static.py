"""Cycles of the TPU kernels, counted in the machine code that libtpu compiles: no TPU needed.

libtpu writes the final bundles of every program it compiles; a TensorCore issues one a cycle. Of
the parts of a kernel's loop the two largest are its bodies: that of a tile seen whole, and that of
one with a mask. A step takes at least as many cycles as it has bundles, and as its products keep
the matrix units busy. On real chips kernels took 1.03 to 1.20 times as long as counted so (splash
attention's recorded times on v5p and v6e against its bundles). The scoring
head is also counted as plain XLA, in the cycles that XLA estimates for its loops.

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
from qed_kernels import score_head as sh  # noqa: E402
from qed_kernels.flash_attention import pallas_tpu  # noqa: E402
from qed_kernels.score_head import pallas_tpu as score_tpu  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Chip:
  """One core: topology, clock in Hz, matrix units and their width, HBM in bytes a second; and how
  many of them a chip has."""

  topology: str
  clock: float
  units: int
  width: int
  hbm: float
  cores: int


CHIPS = {
  "v5e": Chip("v5e:1x1", 1.503e9, 4, 128, 819e9, 1),
  "v5p": Chip("v5p:2x2x1", 1.751e9, 4, 128, 2765e9 / 2, 2),
  "v6e": Chip("v6e:1x1", 1.751e9, 4, 256, 1640e9, 1),
}
N, K, H, T = 32, 8, 128, 4096
PAGE = 256
WIDTH, VOCABULARY = 2560, 151936
KERNELS = (
  *("flash_forward", "flash_backward", "paged_decode", "score_forward", "score_backward"),
  *("splash_mha_fwd", "splash_mha_dkv"),
)
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


def executable(chip: Chip, program, *arguments):
  """The program, compiled for one chip."""
  how = {"chips_per_host_bounds": (1, 1, 1)} if chip.topology.endswith(":1x1") else {}
  described = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology, **how)
  mesh = Mesh(np.array(described.devices[:1]), ("x",))
  place = lambda x: jax.ShapeDtypeStruct(  # noqa: E731
    x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec())
  )
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    return jax.jit(program).lower(*jax.tree.map(place, arguments)).compile()


@dataclasses.dataclass
class Kernel:
  """A Pallas kernel in a compiled program: its machine code, and the bytes of VMEM that it uses
  where the program says so."""

  regions: list[Region]
  vmem: int | None


def compile_for(chip: Chip, program, *arguments) -> dict[str, Kernel]:
  """Compiles for one chip -> the Pallas kernels in it."""
  before = set(DUMP.glob("*-final_bundles.txt"))
  calls = [
    line
    for line in executable(chip, program, *arguments).as_text().splitlines()
    if 'custom_call_target="tpu_custom_call"' in line
  ]
  kernels = {}
  for path in set(DUMP.glob("*-final_bundles.txt")) - before:
    for name in KERNELS:
      if name in path.name and "schedule-analysis" not in path.name and "-TLP-" not in path.name:
        own = next(line for line in calls if name in line.partition("=")[0])
        vmem = re.search(r'used_scoped_memory_configs":\[\{[^}]*"size":"(\d+)"', own)
        kernels[name] = Kernel(regions(path.read_text(errors="replace")), vmem and int(vmem[1]))
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


def splash(chip: Chip) -> dict[str, dict]:
  """jax's own kernels beside ours: a tile of one head, 1,024 queries by 1,024 keys."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  tile, part = 1024, 512
  attend = kernels.make_splash_mha(
    masks.MultiHeadMask([masks.CausalMask((T, T))] * N),
    head_shards=1,
    q_seq_shards=1,
    block_sizes=kernels.BlockSizes(
      block_q=tile, block_kv=tile, block_kv_compute=part, block_q_dkv=tile, block_kv_dkv=tile,
      block_kv_dkv_compute=part, use_fused_bwd_kernel=True,
    ),
  )  # fmt: skip

  def both(q, k, v, segments_BT, do):
    segments = kernels.SegmentIds(segments_BT, segments_BT)
    o, pull = jax.vjp(lambda *qkv: jax.vmap(attend)(*qkv, segments), q, k, v)
    return o, pull(do)

  q, kv, segments_BT = of(1, N, T, H), of(1, K, T, H), of(1, T, dtype=jnp.int32)
  found, rows = compile_for(chip, both, q, kv, kv, segments_BT, q), {}
  for name, products in (("splash_mha_fwd", 2), ("splash_mha_dkv", 5)):
    flops = 2 * products * tile * tile * H
    per_cycle = 2 * chip.units * chip.width * min(chip.width, H)
    rows[name] = summary(chip, found[name], flops, flops / per_cycle)
  return rows


def decode(chip: Chip) -> dict[str, dict]:
  """A page of 256 tokens with 8 key heads, a MiB of keys and values; of two cores each has half."""
  B, pages = 16, 257

  def step(q, k, v, k_LPKSH, v_LPKSH, table_BP, positions_B1):
    cache, new = da.Cache(k_LPKSH, v_LPKSH, None, None, table_BP), da.Tokens(k, v, None, None)
    return da.decode_attention(q, new, cache, 0, positions_B1, implementation="pallas_tpu")

  pool, ints = of(1, pages, K, PAGE, H), lambda *shape: of(*shape, dtype=jnp.int32)
  new = (of(B, 1, N, H), of(B, 1, K, H), of(B, 1, K, H))
  kernels = compile_for(chip, step, *new, pool, pool, ints(B, 16), ints(B, 1))
  read = 2 * K * PAGE * H * 2 / chip.cores
  row = summary(chip, kernels["paged_decode"], 0, chip.clock * read / chip.hbm)
  return {"paged_decode": row}


def scores(implementation: str, chunk: int, backward: bool):
  """The scoring head as a program, and its arguments: 32k tokens of Qwen3-4B, float32 weights."""

  def forward(x, w, target_BT):
    return sh.score_head(x, w, target_BT, 0.8, chunk=chunk, implementation=implementation)

  def both(x, w, target_BT, *cotangents):
    out, pull = jax.vjp(lambda x, w: forward(x, w, target_BT), x, w)
    return out, pull(cotangents)

  size, float32 = (1, 8 * T), jnp.float32
  arguments = (of(*size, WIDTH), of(VOCABULARY, WIDTH, dtype=float32), of(*size, dtype=jnp.int32))
  return (both, *arguments, *[of(*size, dtype=float32)] * 2) if backward else (forward, *arguments)


def score_head(chip: Chip) -> dict[str, dict]:
  """A tile of both kernels; masked is the vocabulary's last block."""
  chosen, blocks = [], score_tpu.blocks
  score_tpu.blocks = lambda *sizes: chosen.append(blocks(*sizes)) or chosen[-1]
  try:
    kernels = compile_for(chip, *scores("pallas_tpu", 0, backward=True))
  finally:
    score_tpu.blocks = blocks
  rows = {}
  for name, products in (("score_forward", 1), ("score_backward", 3)):
    flops = 2 * products * chosen[0].tokens * chosen[0].vocabulary * WIDTH
    bound = flops / (2 * chip.units * chip.width**2)
    rows[name] = summary(chip, kernels[name], flops, bound)
  return rows


def score_xla(chip: Chip) -> dict[str, dict]:
  """A chunk of 1,024 tokens in XLA's programs: the cycles that XLA estimates for the loops' bodies,
  all cores of a chip at work."""
  chunk, rows, before = 1024, {}, 0
  for name, products in (("score_xla_forward", 1), ("score_xla_backward", 3)):
    text = executable(chip, *scores("xla", chunk, backward=products > 1)).as_text()
    loops = text[: text.index("\nENTRY ")]
    cycles = sum(int(n) for n in re.findall(r'estimated_cycles":"(\d+)"', loops)) - before
    flops = 2 * products * chunk * VOCABULARY * WIDTH / chip.cores
    bound = flops / (2 * chip.units * chip.width**2)
    tflops = round(flops / cycles * chip.clock / 1e12, 1)
    rows[name] = {"whole": cycles, "bound_cycles": round(bound), "tflops": tflops}
    before += cycles
  return rows


def summary(chip: Chip, kernel: Kernel, flops: float, bound: float) -> dict:
  """The two bodies of the loop, and cycles that the hardware needs whatever the code is."""
  bodies = sorted((r for r in kernel.regions if r.products), key=lambda r: -r.bundles)[:2]
  masked, whole = bodies[0].bundles, bodies[-1].bundles
  row = {
    "whole": whole,
    "masked": masked,
    "bound_cycles": round(bound),
    "spills": sum(region.spills for region in kernel.regions),
  }
  if kernel.vmem is not None:
    row["vmem_mib"] = round(kernel.vmem / 2**20, 1)
  if flops:
    row["tflops"] = round(flops / max(whole, bound) * chip.clock / 1e12, 1)
  return row


PROGRAMS = {
  "flash": flash,
  "splash": splash,
  "paged_decode": decode,
  "score_head": score_head,
  "score_xla": score_xla,
}


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
  parser.add_argument("--kernels", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
  args = parser.parse_args()
  result = {}
  columns = ("whole", "masked", "bound_cycles", "spills", "vmem_mib", "tflops")
  titles = ("whole", "masked", "bound", "spills", "VMEM MiB", "TF/s")
  print(f"{'chip':<6}{'kernel':<20}" + "".join(f"{title:>11}" for title in titles))
  number = lambda row, key: f"{row[key]:,}" if key in row else "-"  # noqa: E731
  for name in args.chips:
    result[name] = {}
    for program in args.kernels:
      for kernel, row in PROGRAMS[program](CHIPS[name]).items():
        result[name][kernel] = row
        values = "".join(f"{number(row, column):>11}" for column in columns)
        print(f"{name:<6}{kernel:<20}{values}", flush=True)
  print(json.dumps({"cycles": result, "jax": jax.__version__}))
  return 0


if __name__ == "__main__":
  sys.exit(main())
