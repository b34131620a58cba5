"""The training step beside torch transformers' and tunix's, in one run.

On a CPU (no --preset): the model of bench_cpu.py, float32. `update` is loss and gradient of 8 rows
of 128 tokens, clipped, and AdamW, beside torch with its fused AdamW. `grpo` is a whole RL step: 4
attempts of 64 new tokens at each of 8 prompts of 64 tokens, rewards, advantages and one update on
the 32 attempts, beside tunix's GRPO learner on the same work (no KL term; no token ends an attempt
early; its sampler's cache just as long as needed). Libraries live in processes of their own and
take turns; a ratio is the median over neighbouring turns, after the turn that compiles.

With --preset, on an accelerator: the model of that name with random weights in bf16, each layer
rematerialised, one row of --length tokens at a time; tokens/s, MFU (causal halves counted) and peak
memory, beside torch with gradient checkpointing and the attention that transformers picks.

  python tools/bench_train.py --repeats=9 --tunix-python=PYTHON
  python tools/bench_train.py --preset=qwen3-4b --lengths 8192 32768
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import bench_cpu
import bench_engine
import numpy as np
import train_workers
from bench_cpu import NEW, PROMPT, ROWS, SCORED
from bench_engine import ratio, rounds
from engine_workers import OURS, TORCH, TUNIX, start_workers
from train_workers import Run

GROUP = 4
TARGETS = {"update": (TORCH, 1.2), "grpo": (TUNIX, 3.0)}
SAME_LOSS = 1e-4  # of the first update, between float32 libraries
MFU_TARGETS = {8192: 0.50, 32768: 0.45}


def small_folder(folder: Path, seed: int) -> Run:
  """The model of bench_cpu.py with its weights, and the tokens."""
  bench_engine.make_folder(folder, seed, ROWS, [SCORED], [ROWS])
  tokens = np.random.default_rng(seed).integers(0, bench_cpu.SIZES["vocab_size"], (ROWS, SCORED))
  np.save(folder / "tokens.npy", tokens)
  return Run(ROWS, SCORED, PROMPT, NEW, GROUP, "float32", "dots", "auto", SCORED)


def preset_folder(folder: Path, preset: str, length: int, seed: int, attention: str) -> Run:
  """A preset's config.json without weights, and one row of tokens."""
  from qed_jax.model import presets

  model = presets.from_preset(preset, dtype="bfloat16", remat="layer", attention=attention)
  described = presets.to_hf(model, eos_ids=(), bos_id=None, pad_id=0, dtype="bfloat16")
  (folder / "config.json").write_text(json.dumps(described))
  tokens = np.random.default_rng(seed).integers(0, model.vocab_size, (1, length))
  np.save(folder / "tokens.npy", tokens)
  return Run(1, length, PROMPT, NEW, GROUP, "bfloat16", "layer", attention, 1024)


def write_run(folder: Path, run: Run) -> None:
  (folder / "run.json").write_text(json.dumps(dataclasses.asdict(run)))


def side_by_side(workers: dict, work: str, tokens: int, repeats: int) -> dict:
  """The row of a work: this trainer and the one that it is measured against."""
  other, target = TARGETS[work]
  contestants = [(name, work) for name in (OURS, other) if name in workers]
  first, seconds = rounds(workers, contestants, repeats)
  ours = statistics.median(seconds[0])
  found = {
    "qed_jax_s": round(ours, 4),
    "qed_jax_tokens_per_s": round(tokens / ours, 1),
    "first_call_s": round(first[0]["first"], 2),
    "peak_bytes": first[0]["result"]["peak_bytes"],
    "losses": [answer["result"].get("loss") for answer in first],
    "beside": None,
  }
  shown = f"{work:<8}{1e3 * ours:>10,.0f} ms{tokens / ours:>10,.0f} tokens/s"
  if len(contestants) > 1:
    theirs = statistics.median(seconds[1])
    found |= {
      "beside": other,
      "their_s": round(theirs, 4),
      "their_peak_bytes": first[1]["result"].get("peak_bytes"),
      "ratio": round(ratio(seconds[1], seconds[0]), 3),
      "target": target,
    }
    shown += f"   {other} {1e3 * theirs:,.0f} ms   ratio {found['ratio']:.2f} (target {target})"
  print(shown, flush=True)
  return found


def on_cpu(args) -> tuple[dict, dict, bool | None]:
  """(figures by work, what the libraries say of themselves, whether the first losses agree)."""
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    write_run(folder, small_folder(folder, args.seed))
    workers, about = start_workers(train_workers.__file__, args.tunix_python, name)
    tokens = {"update": ROWS * SCORED, "grpo": ROWS * GROUP * NEW}
    figures = {w: side_by_side(workers, w, tokens[w], args.repeats) for w in args.work}
    for worker in workers.values():
      worker.stop()
  losses = figures.get("update", {}).get("losses", [])
  same = abs(losses[0] - losses[1]) < SAME_LOSS if len(losses) > 1 else None
  print(f"losses of the first turn: {losses}, equal to {SAME_LOSS:g}: {same}")
  return figures, about, same


def on_accelerator(args) -> tuple[dict, dict]:
  """(figures by length, what the libraries say of themselves)."""
  import jax

  from qed_jax import metrics
  from qed_jax.model import flops, presets

  figures, about = {}, {}
  for length in args.lengths:
    with tempfile.TemporaryDirectory() as name:
      folder = Path(name)
      write_run(folder, preset_folder(folder, args.preset, length, args.seed, args.attention))
      workers, about = start_workers(train_workers.__file__, args.tunix_python, name)
      found = side_by_side(workers, "update", length, args.repeats)
      for worker in workers.values():
        worker.stop()
    model = presets.from_preset(args.preset, dtype="bfloat16", remat="layer", attention="auto")
    row = np.arange(length)[None]
    done = flops.training(model, row, np.ones_like(row))
    found["mfu"] = metrics.mfu(done, found["qed_jax_s"], jax.devices()[0].device_kind, 1)
    found["mfu_target"] = MFU_TARGETS.get(length)
    peak = found["peak_bytes"]
    shown = [f"MFU {found['mfu']:.3f}"] if found["mfu"] else ["MFU unknown: no known peak"]
    shown += [f"peak {peak / 1e9:.1f} GB"] if peak else []
    print(f"{length:>8,} tokens: {', '.join(shown)}", flush=True)
    figures[f"update_{length}"] = found
  return figures, about


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--repeats", type=int, default=9, help="turns of each library at each work")
  add("--work", nargs="+", choices=tuple(TARGETS), default=list(TARGETS))
  add("--preset", default="", help='a model by name, such as "qwen3-4b"; "" is the small one')
  add("--lengths", type=int, nargs="+", default=[8192, 32768], help="of the row, with --preset")
  add("--attention", default="auto", help="of this trainer, with --preset")
  add("--tunix-python", default=sys.executable, help="an interpreter that has google-tunix 0.1.7")
  add("--seed", type=int, default=0, help="of weights and tokens")
  args = parser.parse_args()
  if not shutil.which(args.tunix_python):
    parser.error(f"--tunix-python={args.tunix_python}: there is no such program")
  sys.path[:0] = [str(bench_cpu.ROOT), str(bench_cpu.ROOT / "kernels")]
  same = None
  if args.preset:
    figures, about = on_accelerator(args)
  else:
    figures, about, same = on_cpu(args)
  print(
    json.dumps({
      "speed": figures,
      "same_loss": same,
      "repeats": args.repeats,
      "device": about[OURS]["device"],
      "cores": len(os.sched_getaffinity(0)),
      "date": datetime.date.today().isoformat(),
      "versions": {"python": platform.python_version()}
      | {p: version for one in about.values() for p, version in one["versions"].items()},
    })
  )  # fmt: skip
  return 1 if same is False else 0


if __name__ == "__main__":
  sys.exit(main())
