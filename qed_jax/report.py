"""One HTML file that shows what runs did; it needs no network.

  python -m qed_jax.report --workdir=runs/demo
  python -m qed_jax.report runs/eval_a runs/eval_b --out=ab.html
  python -m qed_jax.report runs/eval_a --serve

Reads, in the folders and below them, of every training run: metrics.jsonl, samples.jsonl,
config.json, env.json; of every evaluation: eval.jsonl (a row for each graded proof), and
eval_summary.json:
{"rows": [{label, scaffold, turns, n, score, low, high, invalid, missing, truncated,
tokens_per_turn, by_turn: [{turn, score, low, high}], by_length: [{length, score, low, high,
single_pass}]}]}. What is not there is named in the report. Writes report.html and
score_by_turn.png; the same input gives the same bytes. With --serve nothing is written: the page is
at an address of this machine, and shows the longest texts whole.

All text in those files is a model's or a stranger's: it is escaped, or packed for the page's own
script, which makes text of it; and the page's policy admits no other script, no link out and no
style but its own. Tables and pictures are there without scripts.
"""

import argparse
import io
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from qed_jax.reporting import (
  attempts,
  examples,
  figures,
  page,
  reading,
  results,
  scores,
  site,
  training,
  viewer,
)

LONGEST_TEXT = 40_000  # characters of one text in the file's viewer


def render(roots: Sequence[Path], longest: int | None) -> tuple[str, Figure | None, list]:
  """The page, the figure of scores (None where nothing was evaluated), and where the texts are.

  longest: characters of a text that the page holds; None for a page whose texts are served.
  """
  notes: list[str] = []
  stages = [training.read(*found) for found in reading.find(roots, "metrics.jsonl")]
  if not stages:
    notes.append("metrics.jsonl is not there: nothing here was trained.")
  rows = results.read(roots, notes)
  library = attempts.read(roots, notes)
  evaluated = [run for run in library.runs if not run.training]
  benchmarks = [row for run in evaluated for row in scores.by_benchmark(run, library)]
  if rows and not any(row["benchmark"] for row in benchmarks):
    benchmarks = []  # the summaries say the same
  benchmarks.sort(key=lambda row: row["benchmark"])
  scored = [row for row in benchmarks if "score" in row]
  curves = {run.label: scores.by_turn(run) for run in evaluated}
  curves = {run: points for run, points in curves.items() if any(p["tokens"] for p in points)}
  judges = [judge for run in evaluated if (judge := scores.calibration(run))]
  drawn = {
    "scores": figures.scores(rows) if rows else None,
    "length": figures.scores_by_length(rows) if any(r["by_length"] for r in rows) else None,
    "tokens": figures.by_tokens(curves) if curves else None,
    "benchmark": figures.by_benchmark(scored) if scored else None,
    "judge": figures.calibration(judges) if judges else None,
  }
  text = page.render(
    viewer.packed(library, longest) if library.runs else None,
    served=longest is None,
    title=reading.clean(", ".join(root.resolve().name for root in roots)),
    notes=notes,
    results=rows,
    parts=[p for p in ("benchmark", *attempts.PARTS) if any(row[p] for row in rows)],
    benchmarks=benchmarks,
    pairs=scores.pairs(library.runs, notes),
    judges=judges,
    pictures={name: figure and figures.picture(figure) for name, figure in drawn.items()},
    stages=[stage_view(stage, library) for stage in stages],
    groups=examples.of(library),
    config=training.compare([stage.config for stage in stages]),
    env=training.compare([stage.env for stage in stages]),
  )
  return text, drawn["scores"], viewer.sources(library)


def stage_view(stage: training.Stage, library: attempts.Library) -> dict:
  """What the page shows of a training run."""
  kept = [run for run in library.runs if run.label == f"{stage.name}, training"]
  return {
    "name": stage.name,
    "notes": stage.notes,
    "panels": figures.panels(stage.curves),
    "steps": f"{max((steps[-1] for steps, _ in stage.curves.values()), default=0):g}",
    "loss": training.last_of(stage, "loss", "loss/mean"),
    "reward": training.last_of(stage, "reward/mean", "reward"),
    "samples": sum(len(rows) for run in kept for rows in run.attempts.values()),
  }


def write(path: Path, data: bytes) -> None:
  """All of the file or none of it."""
  part = path.with_name(path.name + ".part")
  part.write_bytes(data)
  part.replace(path)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog="qed_jax.report", description=__doc__.splitlines()[0])
  add = parser.add_argument
  add("runs", type=Path, nargs="*", help="folders that hold runs")
  add("--workdir", type=Path, help="the same as one RUN")
  add("--out", type=Path, help="the page's file: RUN/report.html; of several runs report.html here")
  add("--longest", type=int, help="characters of one text; longer ones lose their middle")
  add("--serve", action="store_true", help="write nothing; the page, all texts whole, at 127.0.0.1")
  add("--port", type=int, default=0, help="of --serve; 0 takes a free one")
  parser.set_defaults(longest=LONGEST_TEXT)
  args = parser.parse_args(argv)
  args.runs += [args.workdir] if args.workdir else []
  if not args.runs:
    sys.exit("nothing to report on: name folders that hold runs, or one with --workdir")
  for root in args.runs:
    if not root.is_dir():
      sys.exit(f"{root} is not a local folder: name one that holds runs")
  if args.longest < 1:
    sys.exit(f"--longest={args.longest} leaves no text: use 1 or more")
  if args.serve and args.out:
    sys.exit(f"--out={args.out} with --serve: a served page is not written, drop one of them")
  return args


def main(argv: Sequence[str] | None = None) -> None:
  args = arguments(argv)
  [first, *others] = args.runs
  out = args.out or (Path("report.html") if others else first / "report.html")
  with matplotlib.rc_context(figures.STYLE), warnings.catch_warnings():
    # A label in a script that matplotlib's font lacks is drawn as boxes; the tables have it right.
    warnings.filterwarnings("ignore", message="Glyph .* missing from font")
    text, figure, sources = render(args.runs, None if args.serve else args.longest)
    if figure and not args.serve:
      out.parent.mkdir(parents=True, exist_ok=True)
      png = io.BytesIO()
      figure.savefig(png, format="png", dpi=150, facecolor="white", metadata={"Software": None})
      write(out.with_name("score_by_turn.png"), png.getvalue())
  data = text.encode("utf-8", errors="replace")
  if args.serve:
    serve(data, sources, args.port)
    return
  out.parent.mkdir(parents=True, exist_ok=True)
  write(out, data)
  print(out)


def serve(data: bytes, sources: list, port: int) -> None:
  """Shows the page until it is interrupted."""
  try:
    server = site.make(data, page.policy(live=bool(sources), served=True), sources, port)
  except (OSError, OverflowError) as error:
    sys.exit(f"--port={port} cannot be listened at ({error}): use another, or 0 for a free one")
  print(f"http://{site.HOST}:{server.server_address[1]}/ (Ctrl-C ends it)", flush=True)
  with server:
    try:
      server.serve_forever()
    except KeyboardInterrupt:
      print()


if __name__ == "__main__":
  main()
