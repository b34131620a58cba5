"""The rows of eval_summary.json, with text and numbers where text and numbers belong."""

from collections.abc import Sequence
from pathlib import Path

from qed_jax.reporting import reading
from qed_jax.reporting.reading import clean, number

COLUMNS = ("turns", "n", "invalid", "missing", "truncated", "tokens_per_turn", "tokens", "cost")


def read(roots: Sequence[Path], notes: list[str]) -> list[dict]:
  """The scored rows of every eval_summary.json; a row without a score is named in notes."""
  results = []
  found = reading.find(roots, "eval_summary.json")
  for run, path in found:
    rows = reading.read_object(path, notes).get("rows")
    for row in rows if isinstance(rows, list) else [None]:
      if not isinstance(row, dict) or not interval(row):
        notes.append(f"{run}/{path.name}: a row without a score left out.")
        continue
      by_turn = points(row.get("by_turn"), "turn")
      results.append({
        "label": clean(row.get("label")) or run.rpartition("/")[2],
        **{k: clean(row.get(k)) for k in ("benchmark", "scaffold", "model", "judge")},
        **{k: number(row.get(k)) for k in COLUMNS},
        **interval(row),
        "by_turn": by_turn or [{**interval(row), "turn": number(row.get("turns")) or 1.0}],
        "by_length": points(row.get("by_length"), "length"),
      })  # fmt: skip
  if not found:
    notes.append("eval_summary.json is not there: no evaluation was finished.")
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
