"""What ptxas makes of the Hopper kernels: registers, spills, shared memory. No GPU needed.

jax's CUDA plugin compiles for a GPU that is described to it (here an H200), so the whole way from
Pallas to machine code for sm_90a runs on any Linux machine:

  python3.12 -m venv /tmp/cuda && /tmp/cuda/bin/pip install 'jax[cuda13]>=0.11' absl-py
  /tmp/cuda/bin/python tools/gpu_static.py

Prints a table; the last line is JSON. Exit code 1 when a kernel for which registers must suffice
(forward, dQ, decode) spills.
"""

import dataclasses
import json
import os
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
DUMP = Path(tempfile.mkdtemp(prefix="gpu_static_"))
os.environ |= {
  "JAX_PLATFORMS": "cpu",
  "MOSAIC_GPU_DUMP_TO": str(DUMP),
  "MOSAIC_GPU_DUMP_PTXAS": "1",
}

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402
from qed_kernels import decode_attention as da  # noqa: E402
from qed_kernels import flash_attention as fa  # noqa: E402
from qed_kernels.decode_attention.shapes import REAL  # noqa: E402

# XLA's GpuTargetConfigProto of an H200 SXM.
H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 patch: 0 }
gpu_device_info {
  name: "NVIDIA H200" device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  device_memory_size: 151397597184 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  device_address_bits: 64 dnn_version: "9.10.0"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
}
"""
MAY_SPILL = {"flash_key_value_gradient"}


def compiled(mesh: Mesh, program, *arguments, donate=()):
  """The program for the described GPU; arguments are abstract."""
  place = NamedSharding(mesh, PartitionSpec())
  arguments = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments
  )
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    return jax.jit(program, donate_argnums=donate).lower(*arguments).compile()


def flash(mesh: Mesh, head_dim: int, name: str = "pallas_gpu"):
  """Forward and backward of a row of 4,096 tokens at Qwen3-4B's numbers of heads."""
  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
  q, k = array(1, 4096, 32, head_dim), array(1, 4096, 8, head_dim)

  def loss(q, k, v, segments_BT):
    rows = fa.pack(segments_BT, 32, 8, head_dim, name)
    return fa.flash_attention(q, k, v, rows, implementation=name)[0].astype(jnp.float32).sum()

  segments = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
  return compiled(mesh, jax.grad(loss, argnums=(0, 1, 2)), q, k, k, segments)


def cudnn(mesh: Mesh):
  """The same through cuDNN's packed rows: no kernel of ours, so no row in the table."""
  from jax._src.cudnn import fused_attention_stablehlo

  # It asks the GPU that is here.
  fused_attention_stablehlo.check_compute_capability = lambda capability: True
  return flash(mesh, 128, "cudnn")


def decode(mesh: Mesh, dtype: str):
  """A layer's decode attention, 16 sequences of up to 49,152 tokens, in place."""
  B, length, N, K, H, S = dataclasses.astuple(REAL["16 x 48k"])
  L, P = 36, 2048
  array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
  scales = lambda *shape: array(*shape, dtype="float32") if dtype == "int8" else None  # noqa: E731
  new = da.Tokens(array(B, 1, K, H), array(B, 1, K, H), scales(B, 1, K), scales(B, 1, K))
  cache = da.Cache(
    *(array(L, P, K, S, H), array(L, P, K, S, H), scales(L, P, K, S), scales(L, P, K, S)),
    array(B, length // S, dtype="int32"),
  )
  run = lambda *given: da.decode_attention(*given, implementation="pallas_gpu")  # noqa: E731
  q, at = array(B, 1, N, H, dtype="bfloat16"), array(B, 1, dtype="int32")
  return compiled(mesh, run, q, new, cache, array(dtype="int32"), at, donate=(2,))


def reports() -> list[dict]:
  """What was dumped since the last call, a dict for each kernel."""
  found = []
  for path in sorted(DUMP.glob("*.ptxas")):
    said = path.read_text()
    number = lambda pattern: int(re.search(pattern, said)[1])  # noqa: B023, E731
    memory = re.search(r"smem_scratch_bytes=(\d+)", path.with_suffix(".resources.txt").read_text())
    found.append({
      "kernel": re.sub(r"_\d+$", "", path.stem),
      "registers": number(r"Used (\d+) registers"),
      "spill_bytes": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
      "shared_memory": int(memory[1]),
    })  # fmt: skip
  for path in DUMP.iterdir():
    path.unlink()
  return found


def main() -> int:
  try:
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
  except Exception as error:
    reason = str(error).splitlines()[0][:160]
    print(f"error: no CUDA plugin of jax here ({reason}): see --help's two lines", file=sys.stderr)
    return 2
  mesh = Mesh(np.array(topology.devices), ("device",))
  cases = {
    "head_dim 128": lambda: flash(mesh, 128),
    "head_dim 64": lambda: flash(mesh, 64),
    "bfloat16 pages": lambda: decode(mesh, "bfloat16"),
    "int8 pages": lambda: decode(mesh, "int8"),
  }
  rows, failed = [], []
  print("| kernel | case | registers | spilled bytes | shared memory, KiB | temporaries, MiB |")
  print("|---|---|---|---|---|---|")
  for case, compile_it in cases.items():
    temporary = compile_it().memory_analysis().temp_size_in_bytes
    for row in reports():
      rows.append(row | {"case": case, "temporary": temporary})
      print(
        f"| {row['kernel']} | {case} | {row['registers']} | {row['spill_bytes']} "
        f"| {row['shared_memory'] / 1024:.0f} | {temporary / 2**20:.0f} |",
        flush=True,
      )
      if row["spill_bytes"] and row["kernel"] not in MAY_SPILL:
        failed.append(f"{row['kernel']} ({case}) spills {row['spill_bytes']} bytes")
  calls = cudnn(mesh).as_text().count('custom_call_target="__cudnn$fmha')
  print(f"cuDNN's packed rows: {calls} calls in a forward and backward pass")
  if calls != 2:
    failed.append(f"cuDNN is called {calls} times, not once forward and once backward")
  print(json.dumps({"jax": jax.__version__, "kernels": rows, "failed": failed}))
  return 1 if failed else 0


if __name__ == "__main__":
  if "--help" in sys.argv or "-h" in sys.argv:
    print(__doc__)
    sys.exit(0)
  sys.exit(main())
