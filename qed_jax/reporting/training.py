"""Training runs as the report knows them: curves, config, versions, and what was not there."""

import dataclasses
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from qed_jax.reporting import reading
from qed_jax.reporting.reading import clean, number

DEEPEST = 8  # levels of a config

Curve = tuple[list[float], list[float]]


@dataclasses.dataclass(frozen=True)
class Stage:
  """A training run: its curves by metric name, its config and versions, and what was not there."""

  name: str
  curves: dict[str, Curve]
  config: dict
  env: dict
  notes: list[str]


def read(name: str, metrics: Path) -> Stage:
  """The training run of the folder that holds `metrics`."""
  notes: list[str] = []
  found = curves((row for _, row in reading.lines(metrics, notes)), notes)
  if not metrics.with_name("samples.jsonl").exists():
    notes.append("samples.jsonl is not there.")
  files = (metrics.with_name(f"{part}.json") for part in ("config", "env"))
  config, env = (reading.read_object(path, notes) for path in files)
  return Stage(name, found, config, env, notes)


def curves(rows: Iterable[dict], notes: list[str]) -> dict[str, Curve]:
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


def last_of(stage: Stage, *names: str) -> str:
  return next((f"{stage.curves[n][1][-1]:.4g}" for n in names if n in stage.curves), "")


# --- config and versions


def flatten(value: dict, prefix: str = "", depth: int = 0) -> dict[str, str]:
  """{dotted name: text}; what lies deeper than a config does stays one text."""
  flat = {}
  for key, entry in value.items():
    if isinstance(entry, dict) and entry and depth < DEEPEST:
      flat |= flatten(entry, f"{prefix}{key}.", depth + 1)
    else:
      flat[clean(f"{prefix}{key}")] = clean(entry)
  return flat


def compare(columns: list[dict]) -> list[dict]:
  """Rows (field, a value for each column, whether they differ) over the union of the fields."""
  flat = [flatten(c) for c in columns]
  names = sorted({name for f in flat for name in f})
  rows = [(name, [f.get(name, "") for f in flat]) for name in names]
  return [{"name": n, "values": v, "differs": len(set(v)) > 1} for n, v in rows]
