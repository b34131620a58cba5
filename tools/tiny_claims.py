"""The paper's claims in miniature: three stages on the tiny world, over several seeds.

  python tools/tiny_claims.py --workdir=runs/claims --seeds 0 1 2

Per seed: SFT, then rubric RL and cache RL, both from it as the published models were, and a
held-out evaluation of the untrained model and of each stage at 1..2 T_train turns, summaries by a
frozen copy of the SFT model: the demo's commands with another seed. A killed run
goes on where it was. Prints a table of scores with 95 % bootstrap intervals by seed and draws
WORKDIR/claims.png. Each claim holds when the two intervals do not touch, for every seed; the exit
code is 1 when one does not. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

STAGES = ("untrained", "sft", "rl", "cache_rl")
LABELS = {"untrained": "untrained", "sft": "SFT", "rl": "rubric RL", "cache_rl": "cache RL"}
# (what is claimed, lower stage and turn, higher stage and turn); 0 is T_train, -1 the last turn.
CLAIMS = (
  ("SFT > untrained", ("untrained", 1), ("sft", 1)),
  ("rubric RL > SFT, single pass", ("sft", 1), ("rl", 1)),
  ("cache RL, T turns > rubric RL, single pass", ("rl", 1), ("cache_rl", 0)),
  ("cache RL, T turns > cache RL, single pass", ("cache_rl", 1), ("cache_rl", 0)),
  ("cache RL, 2T turns > cache RL, single pass", ("cache_rl", 1), ("cache_rl", -1)),
)
TRAINED_TURNS = 3


def commands(root: Path, seed: int) -> list[list[str]]:
  """The demo's commands for one seed."""
  python = [sys.executable, "-m"]

  def train(stage, init):
    return [
      *python,
      "qed_jax.train",
      f"--config=configs/{stage}.py:tiny",
      f"--workdir={root / stage}",
      f"--config.seed={seed}",
      *([f"--config.init={root / init}"] if init else []),
    ]

  def evaluate(stage):
    policy = root / ("sft" if stage == "untrained" else stage)
    return [
      *python,
      "qed_jax.evaluate",
      "--config=configs/evaluate.py:tiny",
      f"--workdir={root / 'evaluate' / stage}",
      f"--config.policy={policy}",
      f"--config.label={LABELS[stage]}",
      *(["--config.untrained=True"] if stage == "untrained" else []),
      *([f"--config.summariser={root / 'sft'}"] if stage in ("rl", "cache_rl") else []),
    ]

  trained = [train("sft", ""), train("rl", "sft"), train("cache_rl", "sft")]
  return trained + [evaluate(stage) for stage in STAGES]


def scores(root: Path) -> dict[str, dict]:
  """Stage -> the row of its eval_summary.json."""
  files = {stage: root / "evaluate" / stage / "eval_summary.json" for stage in STAGES}
  return {stage: json.loads(path.read_text())["rows"][0] for stage, path in files.items()}


def at(rows: dict, stage: str, turn: int) -> dict:
  """The score of a stage at a turn of CLAIMS' convention."""
  by_turn = rows[stage]["by_turn"]
  return by_turn[{0: TRAINED_TURNS, -1: len(by_turn)}.get(turn, turn) - 1]


def draw(results: dict[int, dict], path: Path) -> None:
  """Score by turn, a line a stage, a faint line a seed with its interval."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(figsize=(7.2, 4.2))
  for stage, colour in zip(STAGES, ("#6e7781", "#0b6bcb", "#c2570c", "#1a7f37"), strict=True):
    curves = []
    for rows in results.values():
      points = rows[stage]["by_turn"]
      turns = [p["turn"] for p in points]
      curves.append([p["score"] for p in points])
      axes.fill_between(
        turns,
        [p["low"] for p in points],
        [p["high"] for p in points],
        color=colour,
        alpha=0.12,
        lw=0,
      )
      axes.plot(turns, curves[-1], color=colour, alpha=0.35, lw=0.8)
    mean = [sum(c) / len(c) for c in zip(*curves, strict=True)]
    axes.plot(turns, mean, color=colour, lw=2, marker="o", ms=4, label=LABELS[stage])
  axes.axvline(TRAINED_TURNS, color="#d0d7de", lw=1, zorder=0)
  axes.annotate("turns trained", (TRAINED_TURNS, 0.1), fontsize=8, color="#6e7781")
  axes.set(
    xlabel="test-time turns, the same budget each", ylabel="mean rubric score of 7", ylim=(0, 7)
  )
  axes.legend(frameon=False)
  axes.spines[["top", "right"]].set_visible(False)
  figure.tight_layout()
  figure.savefig(path, dpi=150)


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", type=Path, default=Path("runs/claims"))
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
  args = parser.parse_args()
  results = {}
  for seed in args.seeds:
    root = args.workdir / f"seed_{seed}"
    for command in commands(root, seed):
      print("+", " ".join(command[1:]), flush=True)
      subprocess.run(command, check=True)
    results[seed] = scores(root)
  args.workdir.mkdir(parents=True, exist_ok=True)
  draw(results, args.workdir / "claims.png")

  turns = range(1, len(results[args.seeds[0]]["sft"]["by_turn"]) + 1)
  print(f"| seed | stage | {' | '.join(f'{t} turn' + 's' * (t > 1) for t in turns)} |")
  print("|---|---|" + "---|" * len(turns))
  for seed, rows in results.items():
    for stage in STAGES:
      cells = [
        f"{p['score']:.2f} [{p['low']:.2f}, {p['high']:.2f}]" for p in rows[stage]["by_turn"]
      ]
      print(f"| {seed} | {LABELS[stage]} | {' | '.join(cells)} |")
  held = {}
  for name, lower, higher in CLAIMS:
    held[name] = all(at(r, *lower)["high"] < at(r, *higher)["low"] for r in results.values())
    print(f"{'holds' if held[name] else 'FAILS'}: {name}")
  figures = {
    stage: [[p["score"] for p in rows[stage]["by_turn"]] for rows in results.values()]
    for stage in STAGES
  }
  print(json.dumps({"seeds": args.seeds, "score_by_turn": figures, "claims": held}))
  return 0 if all(held.values()) else 1


if __name__ == "__main__":
  sys.exit(main())
