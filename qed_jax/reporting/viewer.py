"""Problems and attempts packed for viewer.js: an index that opens at once, texts that wait.

Everything travels as base64 of zlib-compressed JSON, so that no text of a run meets the HTML
parser; the script makes text nodes of it, and MathML through assets/proof.js of the server's page.
"""

import base64
import itertools
import json
import zlib
from pathlib import Path

from qed_jax.reporting import reading
from qed_jax.reporting.attempts import PARTS, Library, name, statement_of
from qed_jax.reporting.reading import clean, number

MOST_FIELDS = 40  # further fields of a row
TEXTS = {  # names of the page by names of the rows, the first that is there
  "summary": ("summary_before", "summary"),
  "reasoning": ("reasoning",),
  "proof": ("proof",),
  "written": ("summary_after",),
  "feedback": ("feedback",),
  "reason": ("reason",),
}
GIVEN = ("rubric", "reference", "answer")
# What the page shows elsewhere, or what is no property of a proof.
SHOWN = {
  *(key for keys in TEXTS.values() for key in keys), *PARTS, "problem_id", "problem", "statement",
  "rubric", "reference", "answer", "benchmark", "category", "level", "sample", "attempt", "turn",
  "step", "score", "human_score", "finish_reason", "messages",
}  # fmt: skip


def index(library: Library) -> dict:
  """What lists and filters need, a column each.

  Text i is that of attempt i; the problems' follow.
  """
  attempts = [
    (i, problem, sample, rows)
    for i, run in enumerate(library.runs)
    for (problem, sample), rows in run.attempts.items()
  ]
  runs = [{"label": run.label, "training": run.training} for run in library.runs]
  of = library.problems
  fields = ("id", "statement", "benchmark", "category", "level")
  return {
    "runs": runs,
    "problems": {field: [getattr(p, field) for p in of] for field in fields},
    "attempts": {
      "run": [i for i, *_ in attempts],
      "problem": [problem for _, problem, *_ in attempts],
      "sample": [sample for _, _, sample, _ in attempts],
      "scores": [[row.score for row in rows] for *_, rows in attempts],
      "human": [rows[-1].human for *_, rows in attempts],
      "cut": [int(rows[-1].cut) for *_, rows in attempts],
    },
  }


def sources(library: Library) -> list[tuple[Path, list[int]] | list[tuple[Path, int]]]:
  """Where the texts are, in the order of the index.

  (file, rows) of an attempt's turns; of a problem a (file, row) of each run.
  """
  problems: list[dict[Path, int]] = [{} for _ in library.problems]
  attempts = []
  for run in library.runs:
    for (problem, _), rows in run.attempts.items():
      attempts.append((run.path, [row.at for row in rows]))
      problems[problem].setdefault(run.path, rows[0].at)
  return attempts + [list(places.items()) for places in problems]


def text(source: tuple | list, longest: int | None) -> list | dict:
  """What the page shows of an attempt, a dict a turn, or of a problem, a dict.

  source: an entry of `sources`. longest: characters of one text, None for all.
  """
  if isinstance(source, tuple):
    path, places = source
    return [turn(reading.read_row(path, at), longest) for at in places]
  return given([reading.read_row(path, at) for path, at in source], longest)


def turn(row: dict, longest: int | None) -> dict:
  texts = {k: next((row[n] for n in names if row.get(n)), None) for k, names in TEXTS.items()}
  prompt = row.get("messages")
  messages = [m for m in prompt if isinstance(m, dict)] if isinstance(prompt, list) else []
  fields = {name(k): name(v) for k, v in row.items() if k not in SHOWN and v not in (None, "")}
  return {
    "turn": number(row.get("turn")),
    "score": number(row.get("score")),
    "human": number(row.get("human_score")),
    "finish": name(row.get("finish_reason")),
    **{k: clean(v, longest) for k, v in texts.items() if v},
    "messages": [[name(m.get("role")), clean(m.get("content"), longest)] for m in messages],
    "fields": dict(list(fields.items())[:MOST_FIELDS]),
  }


def given(rows: list[dict], longest: int | None) -> dict:
  """The problem's own texts, each from the first row that has it."""
  inner = [row["problem"] if isinstance(row.get("problem"), dict) else {} for row in rows]
  both = [*rows, *inner]
  found = {
    "statement": next((s for s in map(statement_of, rows) if s), ""),
    **{k: next((row[k] for row in both if row.get(k)), "") for k in GIVEN},
  }
  return {k: clean(v, longest) for k, v in found.items()}


def pack(value: object) -> str:
  """Base64 of zlib of JSON."""
  data = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
  return base64.b64encode(zlib.compress(data, 6)).decode()


def packed(library: Library, longest: int | None) -> dict[str, str]:
  """The packed index, and the packed texts one after another; the index has where each ends.

  longest: as in `text`; None for a page that asks a server for its texts.
  """
  if longest is None:
    return {"index": pack(index(library)), "texts": ""}
  pieces = [pack(text(source, longest)) for source in sources(library)]
  ends = list(itertools.accumulate(map(len, pieces)))
  return {"index": pack(index(library) | {"ends": ends}), "texts": "".join(pieces)}
