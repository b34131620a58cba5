"""Whether a config fits on chips that are not here, and how fast a step could be there.

  python tools/plan.py --config=configs/cache_rl.py --topology=v5p:4x4x4
  python tools/plan.py --config=configs/sft.py --topology=v5e-64 --config.batch.row_length=16384
  python tools/plan.py --config=configs/rl.py:gpu --topology=h200:1 --save=runs/plans.json

Topologies are libtpu's names ("v5e:2x4"), Cloud's ("v6e-64", "v5p-128") or a number of GPUs
("h200:1"). With libtpu (`make aot`) the config's own programs are compiled for the chips by the
real TPU compiler: the training step, the optimizer's init, the reshard to the sampler, prefill and
decode; minutes at 4B, with progress on the way. Without it, for GPUs, and with --estimate, memory
is estimated from sizes, within 15 % of the compiler's total, and says so.

Prints HBM by kind, bytes that collectives send by mesh axis, the roofline of a step and its MFU
bound, keys and values that fit, and, where the config does not fit, the cheapest change that makes
it fit. In RL a step is the largest there is: every attempt as long as it may be. MFU counts the
model's products, causal halves only, without remat. Exits 1 when it does not fit, 2 when the
config or the topology is impossible. The last line is JSON; --save adds it to a file of them, of
which --table makes the table of a page.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]
os.environ["JAX_PLATFORMS"] = "cpu"

from absl import flags as absl_flags  # noqa: E402

from qed_jax import flags  # noqa: E402
from qed_jax.model import kv_cache  # noqa: E402
from qed_jax.planning import chips, memory, remedies, roofline, table  # noqa: E402

TOPOLOGY = absl_flags.DEFINE_string("topology", None, "v5p:4x4x4, v6e-64, h200:1, ...")
SLICES = absl_flags.DEFINE_integer("slices", 1, "slices joined by the data-centre network")
SAVE = absl_flags.DEFINE_string("save", "", "a JSON file of results to add this one to")
ESTIMATE = absl_flags.DEFINE_boolean("estimate", False, "estimate from sizes; compile nothing")
TABLE = absl_flags.DEFINE_string("table", "", "a page with a table of all results in --save")
FIND = absl_flags.DEFINE_boolean("remedy", True, "look for a change that fits where it does not")


def main(config, _) -> None:
  if TABLE.value and not SAVE.value:
    raise ValueError("--table shows what --save has saved: give both")
  if not TOPOLOGY.value:
    raise ValueError("--topology is missing: name one such as v5p:4x4x4, v6e-64 or h200:1")
  topology = chips.parse(TOPOLOGY.value, SLICES.value)
  if "optimizer" not in config:
    raise ValueError(
      "--config has no optimizer: tools/plan.py plans training jobs (sft, rl, cache_rl)"
    )
  model = memory.sizes(config)
  mesh = memory.mesh_sizes(config, topology.devices)
  memory.check(config, model, mesh)
  if topology.slices > 1 and mesh.shape["data"] % topology.slices:
    raise ValueError(
      f"config.mesh.data is {mesh.shape['data']} and --slices {topology.slices}: only the data "
      f"axis crosses slices, set data={topology.slices}"
    )
  estimated = memory.estimate(config, model, mesh, topology.is_tpu)
  found = compiled(config, model, topology)
  result = assemble(config, model, mesh, topology, estimated, found)
  if not result["fits"] and FIND.value:
    result["remedy"] = remedy(config, topology, result, estimated)
  show(result)
  if SAVE.value:
    saved = save(Path(SAVE.value), result)
    if TABLE.value:
      page = Path(TABLE.value)
      page.write_text(table.replaced(page.read_text(), saved))
  print(json.dumps(result))
  sys.exit(0 if result["fits"] else 1)


def say(line: str) -> None:
  print(line, flush=True)


def compiled(config, model, topology):
  """What the compiler says, or None where there is none for these chips."""
  if ESTIMATE.value or not topology.is_tpu:
    return None
  import plan_programs  # sets libtpu's variables

  if not plan_programs.available():
    say("libtpu is not installed (`make aot` does it): an estimate from sizes")
    return None
  return plan_programs.compile_all(config, model, topology, say)


def assemble(config, model, mesh, topology, estimated: memory.Memory, found) -> dict:
  """The figures of one config on one topology."""
  chip = topology.chip
  kinds = dataclasses.asdict(estimated)
  sent = roofline.traffic(config, model, mesh, topology.slices)
  refused = ""
  if found is not None:
    step = found["train step"]
    refused = next((c.refused for c in found.values() if c.refused), "")
    state = estimated.weights + estimated.optimizer + estimated.batch
    scratch = step.temporaries - (state if step.refused else 0)
    # The compiler gives one sum for all that lives within a step; gradients and what remat keeps
    # are known, the rest is what the layers need.
    kinds["temporaries"] = max(0.0, scratch - estimated.gradients - estimated.activations)
    if not step.refused:
      kinds["batch"] += step.arguments - state  # and padding
      sent = {name_of(axes, topology): size for axes, size in step.sent.items()}
    others = [
      c.temporaries for name, c in found.items() if name not in ("train step", "optimizer init")
    ]
    # Sampling and training take turns: the larger scratch counts.
    kinds["temporaries"] = max(
      kinds["temporaries"], max(others, default=0) - estimated.gradients - estimated.activations
    )
  needed = sum(kinds.values())
  line = roofline.training(config, model, mesh, chip, sent)
  result = {
    "config": command_config(),
    "topology": topology.name,
    "slices": topology.slices,
    "source": "compiled" if found is not None else "estimate",
    "mesh": mesh.shape,
    "gb": {name: roofline.gigabytes(x) for name, x in kinds.items()},
    "needed_gb": roofline.gigabytes(needed),
    "chip_gb": roofline.gigabytes(chip.memory),
    "estimate_gb": roofline.gigabytes(estimated.total),
    "fits": needed <= chip.memory and not refused,
    "sent_gb": {axes: roofline.gigabytes(x) for axes, x in sent.items()},
    "rows": memory.rows_of_step(config),
    "row_length": config.batch.row_length,
    "model_pflop": round(line.flops / 1e15, 1),
    "seconds": {name: round(getattr(line, name), 3) for name in (*roofline.BOUNDS, "seconds")},
    "bound_by": line.bound_by,
    "mfu_bound": round(line.mfu, 3),
    "versions": versions(),
    "date": datetime.date.today().isoformat(),
  }
  if found is not None:
    result["compile_s"] = {name: round(c.seconds) for name, c in found.items()}
    result["temporaries_gb"] = {n: roofline.gigabytes(c.temporaries) for n, c in found.items()}
    if refused:
      result["refused"] = refused
  if config.job != "sft":
    result["sampling"] = sampling(config, model, mesh, chip, chip.memory - needed)
  return result


def name_of(axes: str, topology) -> str:
  """Of several slices the data axis crosses the network."""
  return f"dcn:{axes}" if topology.slices > 1 and "data" in axes.split("+") else axes


def sampling(config, model, mesh, chip, free: float) -> dict:
  """Keys and values of a replica: those of the config, and what the free memory would add."""
  shapes = memory.engine_shapes(config.rollout, mesh)
  tensor = mesh.shape["tensor"]
  a_token = kv_cache.bytes_per_token(model, shapes.kv_dtype or model.dtype)
  held = (shapes.pool - 1) * shapes.page
  more = max(0, int(free * tensor / a_token) // shapes.page * shapes.page)
  replicas = mesh.size // tensor
  context = min(held // max(1, shapes.slots), shapes.max_length)
  seconds = roofline.decode_seconds(model, shapes.slots, context, a_token, tensor, chip)
  return {
    "replicas": replicas,
    "kv_tokens": held * replicas,
    "attempts_of_max_length": held // shapes.max_length * replicas,
    "kv_tokens_that_fit": (held + more) * replicas,
    "attempts_that_fit": (held + more) // shapes.max_length * replicas,
    "decode_ms": round(1e3 * seconds, 2),
    "tokens_per_s": round(shapes.slots * replicas / seconds),
    "at_context": context,
  }


def remedy(config, topology, result: dict, estimated: memory.Memory) -> dict | None:
  """The cheapest change that fits, confirmed by the compiler where there is one."""
  scale = result["needed_gb"] * 1e9 / estimated.total
  for _ in range(2):
    found = remedies.cheapest(config, topology, scale)
    if found is None:
      return None
    say(f"trying {found.flags}")
    changed = remedies.changed(config, found.changes)
    model, mesh = memory.sizes(changed), memory.mesh_sizes(changed, topology.devices)
    again = memory.estimate(changed, model, mesh, topology.is_tpu)
    programs = compiled(changed, model, topology)
    if programs is None:
      needed, confirmed = found.bytes, False
    else:
      checked = assemble(changed, model, mesh, topology, again, programs)
      needed, confirmed = checked["needed_gb"] * 1e9, checked["fits"]
      if not confirmed:  # the estimate was too low for such a change
        scale *= 1.02 * needed / found.bytes
        continue
    return {
      "flags": found.flags,
      "needed_gb": roofline.gigabytes(needed),
      "seconds": round(found.seconds, 3),
      "confirmed": confirmed,
    }
  return None


def show(r: dict) -> None:
  """The table for people."""
  mesh = " x ".join(f"{axis} {n}" for axis, n in r["mesh"].items() if n > 1) or "one device"
  how = "compiled by libtpu" if r["source"] == "compiled" else "ESTIMATED from sizes, not compiled"
  print(f"\n{r['config']} on {r['topology']}: {mesh}; {how}\n")
  print(f"  {'GB a chip':24}{r['needed_gb']:8.2f} of {r['chip_gb']:.2f}")
  for name, size in r["gb"].items():
    if size:
      print(f"    {name.replace('_', ' '):22}{size:8.2f}")
  print(f"  {'GB sent a chip, a step':24}")
  for axes, size in r["sent_gb"].items():
    print(f"    {axes:22}{size:8.2f}")
  s = r["seconds"]
  print(
    f"  step: {r['rows']} rows of {r['row_length']} tokens, {r['model_pflop']} PFLOP; at least "
    f"{s['seconds']} s (" + ", ".join(f"{n} {s[n]}" for n in roofline.BOUNDS if s[n]) + ")"
  )
  print(f"  MFU bound {r['mfu_bound']}, by {r['bound_by']}")
  if e := r.get("sampling"):
    print(
      f"  sampling: {e['kv_tokens']} tokens of keys and values on {e['replicas']} replicas "
      f"({e['attempts_of_max_length']} attempts of the largest length; {e['kv_tokens_that_fit']} "
      f"tokens, {e['attempts_that_fit']} attempts would fit); at least {e['decode_ms']} ms a token "
      f"of {e['at_context']} tokens' context, {e['tokens_per_s']} tokens/s"
    )
  if r["fits"]:
    print(f"  fits, {r['chip_gb'] - r['needed_gb']:.2f} GB to spare\n")
    return
  print(
    f"  DOES NOT FIT: {r.get('refused') or 'over by %.2f GB' % (r['needed_gb'] - r['chip_gb'])}"
  )
  if fix := r.get("remedy"):
    sure = "the compiler agrees" if fix["confirmed"] else "estimated"
    print(f"  cheapest change: {fix['flags']} ({fix['needed_gb']} GB a chip, {sure})\n")
  elif "remedy" in r:
    print("  no change of one or two levers makes it fit: use more chips\n")


def command_config() -> str:
  """The config as it was named, with its overrides."""
  words = [w.removeprefix("--") for w in sys.argv[1:]]
  named = [w.partition("=")[2] for w in words if w.startswith("config=")]
  return " ".join([*named, *(f"--{w}" for w in words if w.startswith("config."))])


def versions() -> dict[str, str]:
  names = ("jax", "libtpu")
  found = {}
  for name in names:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def save(path: Path, result: dict) -> list[dict]:
  """Adds a result to a file of them, in place of one for the same config and topology."""
  key = lambda r: (r["config"], r["topology"], r["slices"], r["source"])  # noqa: E731
  old = json.loads(path.read_text()) if path.exists() else []
  rows = [r for r in old if key(r) != key(result)] + [result]
  path.parent.mkdir(parents=True, exist_ok=True)
  unfinished = path.with_suffix(".tmp")
  unfinished.write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")
  unfinished.replace(path)
  return rows


if __name__ == "__main__":
  flags.run(main, needs_workdir=False)
