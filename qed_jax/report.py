"""One HTML file that shows what a folder of runs did; it needs no network and runs no script.

  python -m qed_jax.report --workdir=runs/demo

Reads, in the folder and below it, of every training run: metrics.jsonl, samples.jsonl, config.json,
env.json; of every evaluation: eval.jsonl (a row for each problem and turn) and eval_summary.json:
{"rows": [{label, scaffold, turns, n, score, low, high, invalid, missing, truncated,
tokens_per_turn, by_turn: [{turn, score, low, high}], by_length: [{length, score, low, high,
single_pass}]}]}. What is not there is named in the report. Writes report.html and
score_by_turn.png; the same input gives the same bytes.

All text in those files is a model's or a stranger's: it is escaped, and the page's policy admits no
script, no link out and no style but its own.
"""

import argparse
import base64
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import re
import sys
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jinja2
import matplotlib
from matplotlib.figure import Figure

from qed_jax import figures

STAGES = ("untrained", "sft", "rl", "cache_rl")
PRUNED = {"checkpoints", "tb", "__pycache__"}
LONGEST_TEXT = 6_000  # characters of one text that the page shows
LONGEST_FILE = 20_000  # last rows of a JSONL file of texts
MOST_COLUMNS = 8
NARROW_LINE = 26  # characters; columns of such lines may be narrow
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class Stage:
  """A training run: its curves by metric name, its sampled rollouts, and what was not there."""

  name: str
  curves: dict[str, figures.Curve]
  samples: list[dict]
  config: dict
  env: dict
  notes: list[str]


# --- reading


def find(workdir: Path, name: str) -> list[Path]:
  """The files of this name in workdir and below, stages in the order of training."""
  found = []
  for folder, folders, files in os.walk(workdir):
    folders[:] = [f for f in folders if f not in PRUNED]
    if name in files:
      found.append(Path(folder) / name)

  def order(path: Path):
    place = path.parent.relative_to(workdir).parts
    return [(STAGES.index(p) if p in STAGES else len(STAGES), p) for p in place]

  return sorted(found, key=order)


def clip(text: str) -> str:
  """The text, without the middle of a very long one."""
  if len(text) <= LONGEST_TEXT:
    return text
  tail = LONGEST_TEXT // 3
  left_out = f"\n[... {len(text) - LONGEST_TEXT:,} characters left out ...]\n"
  return text[: LONGEST_TEXT - tail] + left_out + text[-tail:]


def clean(value: object) -> str:
  """Anything as text that can be shown: clipped, and control characters marked."""
  text = value if isinstance(value, str) else "" if value is None else dump(value)
  return UNSEEN.sub("\ufffd", clip(text.replace("\r\n", "\n")))


def dump(value: object) -> str:
  return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def read_lines(path: Path, notes: list[str], keep: int | None = None) -> list[dict]:
  """Rows of a JSONL file, the last `keep` of them; a line that is no object is counted in notes."""
  rows, bad = deque(maxlen=keep), 0
  try:
    with path.open(encoding="utf-8", errors="replace") as lines:
      for line in lines:
        try:
          row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
          row = "broken"
        if isinstance(row, dict):
          rows.append({k: clip(v) if isinstance(v, str) else v for k, v in row.items()})
        elif row is not None:
          bad += 1
  except FileNotFoundError:
    notes.append(f"{path.name} is not there.")
  if bad:
    notes.append(f"{path.name}: {bad} unreadable line{'s' * (bad > 1)} left out.")
  return list(rows)


def read_object(path: Path, notes: list[str]) -> dict:
  try:
    value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
  except FileNotFoundError:
    notes.append(f"{path.name} is not there.")
    return {}
  except (ValueError, RecursionError):
    value = None
  if not isinstance(value, dict):
    notes.append(f"{path.name} is not a JSON object.")
    return {}
  return value


def number(value: object) -> float | None:
  """A finite float, or None for everything else."""
  if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
    return None
  return float(value) if math.isfinite(value) else None


def curves(rows: Iterable[dict], notes: list[str]) -> dict[str, figures.Curve]:
  """{metric: (steps, values)}; of a step that was logged twice, as after a resume, the later."""
  at: dict[str, dict[float, float]] = {}
  lost: Counter[str] = Counter()
  for row in rows:
    step = number(row.get("step"))
    if isinstance(row.get("not_finite"), dict):
      lost.update(clean(name) for name in row["not_finite"])
    for name, value in row.items() if step is not None else ():
      if name in ("step", "time") or isinstance(value, bool) or not isinstance(value, int | float):
        continue
      name = clean(name)
      if (finite := number(value)) is None:
        lost[name] += 1
      else:
        at.setdefault(name, {})[step] = finite
  notes += [f"{name}: {count} value(s) not finite, left out." for name, count in lost.items()]
  return {n: (sorted(v), [v[step] for step in sorted(v)]) for n, v in at.items()}


def read_stage(workdir: Path, metrics: Path) -> Stage:
  notes: list[str] = []
  folder = metrics.parent
  return Stage(
    name=clean("/".join(folder.relative_to(workdir).parts) or folder.resolve().name),
    curves=curves(read_lines(metrics, notes), notes),
    samples=read_lines(folder / "samples.jsonl", notes, LONGEST_FILE),
    config=read_object(folder / "config.json", notes),
    env=read_object(folder / "env.json", notes),
    notes=notes,
  )


def read_results(workdir: Path, notes: list[str]) -> list[dict]:
  """The rows of every eval_summary.json, with text and numbers where text and numbers belong."""
  results = []
  paths = find(workdir, "eval_summary.json")
  for path in paths:
    rows = read_object(path, notes).get("rows")
    for row in rows if isinstance(rows, list) else [None]:
      if not isinstance(row, dict) or not interval(row):
        notes.append(f"{clean(path.parent.name)}/{path.name}: a row without a score left out.")
        continue
      by_turn = points(row.get("by_turn"), "turn")
      columns = ("turns", "n", "invalid", "missing", "truncated", "tokens_per_turn")
      results.append({
        "label": clean(row.get("label")) or clean(path.parent.name),
        "scaffold": clean(row.get("scaffold")),
        **{k: number(row.get(k)) for k in columns},
        **interval(row),
        "by_turn": by_turn or [{**interval(row), "turn": number(row.get("turns")) or 1.0}],
        "by_length": points(row.get("by_length"), "length"),
      })  # fmt: skip
  if not paths:
    notes.append("eval_summary.json is not there: nothing in this folder was evaluated.")
  return results


def interval(row: object) -> dict:
  """score, low and high, or {} without a score; without an interval all three are the score."""
  if not isinstance(row, dict) or (score := number(row.get("score"))) is None:
    return {}
  ends = {end: number(row.get(end)) for end in ("low", "high")}
  return {"score": score, **{k: score if v is None else v for k, v in ends.items()}}


def points(rows: object, at: str) -> list[dict]:
  """Rows with a score, in their order; a turn is a number, a length the name of a group."""
  points = []
  for row in rows if isinstance(rows, list) else ():
    if interval(row) and (at != "turn" or number(row.get(at)) is not None):
      place = number(row[at]) if at == "turn" else clean(row.get(at))
      points.append({at: place, **interval(row), "single_pass": interval(row.get("single_pass"))})
  return points


# --- tables and examples


def flatten(value: dict, prefix: str = "") -> dict[str, str]:
  flat = {}
  for key, entry in value.items():
    if isinstance(entry, dict) and entry:
      flat |= flatten(entry, f"{prefix}{key}.")
    else:
      flat[clean(f"{prefix}{key}")] = clean(entry)
  return flat


def compare(columns: Sequence[dict]) -> list[dict]:
  """Rows (field, a value for each column, whether they differ) over the union of the fields."""
  flat = [flatten(c) for c in columns]
  names = sorted({name for f in flat for name in f})
  rows = [(name, [f.get(name, "") for f in flat]) for name in names]
  return [{"name": n, "values": v, "differs": len(set(v)) > 1} for n, v in rows]


def badge(row: dict) -> dict:
  """A grade as shown: "6 of 7" and the name of its colour; no score is no zero."""
  score = number(row.get("score"))
  if score is None:
    return {"text": "not graded", "kind": "none"}
  kind = "low" if score < 2.5 else "middle" if score < 5.5 else "high"
  return {"text": f"{score:g} of 7" if 0 <= score <= 7 else f"{score:g}", "kind": kind}


def example(title: str, rows: list[dict]) -> dict:
  """A problem and its turns, a column each; a row of the table that is empty drops out."""
  problem = rows[0].get("problem")
  inner = problem if isinstance(problem, dict) else {}
  statement = (
    inner.get("statement", problem) or rows[0].get("statement") or rows[0].get("problem_id")
  )
  prompt = rows[0].get("messages")
  messages = [m for m in prompt if isinstance(m, dict)] if isinstance(prompt, list) else []
  kinds = {
    "Summary so far": lambda r: r.get("summary_before", r.get("summary")),
    "Reasoning": lambda r: r.get("reasoning"),
    "Proof": lambda r: r.get("proof"),
    "Summary written": lambda r: r.get("summary_after"),
    "Grader's words": lambda r: r.get("feedback") or r.get("reason"),
  }
  columns = rows[:MOST_COLUMNS]
  cells = {kind: [clean(of(r)) for r in columns] for kind, of in kinds.items()}
  longest = max(len(line) for texts in cells.values() for t in texts for line in t.split("\n"))
  return {
    "title": title,
    "statement": clean(statement),
    "short": figures.short(clean(statement), 70),
    "rubric": clean(inner.get("rubric") or rows[0].get("rubric")),
    "messages": [(clean(m.get("role")), clean(m.get("content"))) for m in messages],
    "columns": [
      {
        "title": f"Turn {clean(r.get('turn'))}" if r.get("turn") is not None else "Answer",
        "cut": r.get("finish_reason") == "length",
        "badge": badge(r),
      }
      for r in columns
    ],
    "narrow": longest < NARROW_LINE,
    "left_out": len(rows) - len(columns),
    "cells": [(kind, texts) for kind, texts in cells.items() if any(texts)],
  }


def examples(rows: list[dict], group: Callable[[dict], object]) -> list[dict]:
  """Three problems, picked by rule: the best last grade (of equals, the largest gain), the median
  and the worst."""
  grouped: dict[str, list[dict]] = {}
  for row in rows:
    grouped.setdefault(dump(group(row)), []).append(row)
  for members in grouped.values():
    members.sort(key=lambda r: number(r.get("turn")) or 0)

  def merit(members: list[dict]):
    scores = [number(r.get("score")) for r in members]
    first, last = (-1.0 if s is None else s for s in (scores[0], scores[-1]))
    return last, last - first

  ranked = sorted(grouped.values(), key=merit, reverse=True)
  picks = {"best": 0, "median": len(ranked) // 2, "worst": len(ranked) - 1}
  chosen = {place: name for name, place in reversed(picks.items()) if ranked}
  return [example(chosen[place], ranked[place]) for place in sorted(chosen)]


def problem_of(row: dict) -> object:
  return [row.get(k) for k in ("problem_id", "problem", "sample", "attempt")]


def sample_examples(stage: Stage) -> tuple[str, list[dict]]:
  """The kept rollouts of the last step that has any."""
  steps = [number(r.get("step")) for r in stage.samples]
  last = max((s for s in steps if s is not None), default=None)
  rows = [r for r, s in zip(stage.samples, steps, strict=True) if s == last]
  title = f"{stage.name}, training" + (f", step {last:g}" if last is not None else "")
  return title, examples(rows, problem_of)


def eval_examples(workdir: Path, notes: list[str]) -> list[tuple[str, list[dict]]]:
  """Of every eval.jsonl, under the label of the eval_summary.json beside it."""
  groups = []
  for path in find(workdir, "eval.jsonl"):
    rows = read_object(path.with_name("eval_summary.json"), []).get("rows")
    labels = [r.get("label") for r in rows if isinstance(r, dict)] if isinstance(rows, list) else []
    label = clean(labels[0]) if len(labels) == 1 else clean(path.parent.name)
    found = examples(read_lines(path, notes, LONGEST_FILE), problem_of)
    groups.append((f"{label}, evaluation", found))
  if not groups:
    notes.append("eval.jsonl is not there: no examples of evaluated proofs.")
  return groups


# --- the page


def digest(text: str) -> str:
  """The source expression by which a content security policy admits this very style sheet."""
  return "sha256-" + base64.b64encode(hashlib.sha256(str(text).encode()).digest()).decode()


def last_of(stage: Stage, *names: str) -> str:
  return next((f"{stage.curves[n][1][-1]:.4g}" for n in names if n in stage.curves), "")


def stage_view(stage: Stage) -> dict:
  """What the page shows of a training run."""
  return {
    "name": stage.name,
    "notes": stage.notes,
    "panels": figures.panels(stage.curves),
    "steps": f"{max((steps[-1] for steps, _ in stage.curves.values()), default=0):g}",
    "loss": last_of(stage, "loss", "loss/mean"),
    "reward": last_of(stage, "reward/mean", "reward"),
    "samples": len(stage.samples),
  }


@functools.cache
def template() -> jinja2.Template:
  env = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  env.filters["digest"] = digest
  return env.get_template("report.html.jinja")


def page(**parts) -> str:
  """The page of these parts; what is not given is empty."""
  empty = dict.fromkeys(("notes", "results", "stages", "groups", "config", "env"), ())
  return template().render(empty | parts)


def render(workdir: Path) -> tuple[str, Figure | None]:
  """The page, and the figure of scores (None where nothing was evaluated)."""
  notes: list[str] = []
  stages = [read_stage(workdir, path) for path in find(workdir, "metrics.jsonl")]
  if not stages:
    notes.append("metrics.jsonl is not there: nothing in this folder was trained.")
  results = read_results(workdir, notes)
  groups = eval_examples(workdir, notes) + [sample_examples(s) for s in stages]
  figure = figures.scores(results) if results else None
  by_length = figures.scores_by_length(results) if any(r["by_length"] for r in results) else None
  text = page(
    title=clean(workdir.resolve().name),
    notes=notes,
    results=results,
    score_picture=figure and figures.picture(figure),
    length_picture=by_length and figures.picture(by_length),
    stages=[stage_view(s) for s in stages],
    groups=[(title, shown) for title, shown in groups if shown],
    config=compare([s.config for s in stages]),
    env=compare([s.env for s in stages]),
  )
  return text, figure


def write(path: Path, data: bytes) -> None:
  """All of the file or none of it."""
  part = path.with_name(path.name + ".part")
  part.write_bytes(data)
  part.replace(path)


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(prog="qed_jax.report", description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", type=Path, required=True, help="the folder that holds the runs")
  parser.add_argument("--out", type=Path, help="where the page goes; WORKDIR/report.html")
  args = parser.parse_args(argv)
  if not args.workdir.is_dir():
    sys.exit(f"--workdir={args.workdir} is not a local folder: name one that holds runs")
  out = args.out or args.workdir / "report.html"
  with matplotlib.rc_context(figures.STYLE), warnings.catch_warnings():
    # A label in a script that matplotlib's font lacks is drawn as boxes; the tables have it right.
    warnings.filterwarnings("ignore", message="Glyph .* missing from font")
    text, figure = render(args.workdir)
    out.parent.mkdir(parents=True, exist_ok=True)
    if figure:
      png = io.BytesIO()
      figure.savefig(png, format="png", dpi=150, facecolor="white", metadata={"Software": None})
      write(out.with_name("score_by_turn.png"), png.getvalue())
  write(out, text.encode("utf-8", errors="replace"))
  print(out)


if __name__ == "__main__":
  main()
