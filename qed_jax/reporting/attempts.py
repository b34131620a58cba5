"""Graded proofs of evaluations and of training: what tables need of them, and where texts are.

A row of eval.jsonl or samples.jsonl is one graded proof. Rows of the same run, problem and sample
are the turns of one attempt. The texts stay in the files, which may be larger than memory.
"""

import dataclasses
import itertools
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from qed_jax.reporting import reading
from qed_jax.reporting.reading import clean, number

MOST_ROWS = 200_000  # of one file
LONGEST_STATEMENT = 2_000  # characters of a statement in lists; its page has all of it
LONGEST_NAME = 200
PARTS = ("scaffold", "model", "judge")  # what tells the runs of one file apart


@dataclasses.dataclass(frozen=True)
class Problem:
  """A problem that some run attempted. The same statement in two runs is the same problem."""

  id: str
  statement: str
  benchmark: str
  category: str
  level: str


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
  """One graded proof. score: the judge's, human: people's, each None where there is none.

  step: the training step. tokens: those of the turn and of its summary. at: the byte of the file at
  which the row starts.
  """

  turn: float
  step: float | None
  score: float | None
  human: float | None
  tokens: float
  cut: bool
  at: int


@dataclasses.dataclass(frozen=True)
class Run:
  """Attempts by (problem, sample), each with its turns in order; problems by their index."""

  label: str
  path: Path
  training: bool
  parts: tuple[str, ...]
  attempts: dict[tuple[int, str], list[Row]]

  def last(self) -> Iterator[tuple[int, Row]]:
    """(problem, last turn) of every attempt."""
    return ((problem, rows[-1]) for (problem, _), rows in self.attempts.items())


@dataclasses.dataclass(frozen=True)
class Library:
  """All runs, and all problems that they speak of."""

  runs: list[Run]
  problems: list[Problem]


def name(value: object) -> str:
  return clean(value, LONGEST_NAME)


def statement_of(row: dict) -> object:
  """The statement, in whichever of the known ways the row holds it."""
  problem = row.get("problem")
  inner = problem.get("statement") if isinstance(problem, dict) else problem
  return inner or row.get("statement") or row.get("problem_id")


def read(roots: Sequence[Path], notes: list[str]) -> Library:
  """Every eval.jsonl and samples.jsonl in the roots and below."""
  library, seen = Library([], []), {}
  for kind in ("eval.jsonl", "samples.jsonl"):
    found = reading.find(roots, kind)
    for run, path in found:
      for found_run in read_file(run, path, kind != "eval.jsonl", library.problems, seen, notes):
        taken = {r.label for r in library.runs}
        label = next(x for x in names(found_run.label, run) if x not in taken)
        library.runs.append(dataclasses.replace(found_run, label=label))
    if not found and kind == "eval.jsonl":
      notes.append("eval.jsonl is not there: no evaluated proofs to read.")
  return library


def names(label: str, run: str) -> Iterator[str]:
  """What a run may be called, for runs of the same label."""
  yield label
  yield f"{label} ({run})"
  yield from (f"{label} ({run}, {i})" for i in itertools.count(2))


def read_file(
  run: str, path: Path, training: bool, problems: list[Problem], seen: dict, notes: list[str]
) -> list[Run]:
  """The runs of one file. problems, and `seen` (their indices), grow by what is new in it."""
  own: list[str] = []
  groups: dict[tuple[str, ...], dict] = {}
  for count, (at, row) in enumerate(reading.lines(path, own)):
    if count == MOST_ROWS:
      own.append(f"{path.name}: only the first {MOST_ROWS:,} rows are shown.")
      break
    parts = tuple("" if training else name(row.get(part)) for part in PARTS)
    attempt = index_of(row, problems, seen), sample_of(row, training)
    turn = number(row.get("turn"))
    found = Row(
      turn=1.0 if turn is None else turn,
      step=number(row.get("step")),
      score=number(row.get("score")),
      human=number(row.get("human_score")),
      tokens=sum(number(row.get(k)) or 0.0 for k in ("tokens", "summary_tokens")),
      cut=row.get("finish_reason") == "length",
      at=at,
    )
    # Of two rows for the same turn the later one counts, as it does in evaluate.py.
    groups.setdefault(parts, {}).setdefault(attempt, {})[found.turn] = found
  notes += [f"{run}/{note}" for note in own]
  label = f"{run}, training" if training else own_label(path) or run.rpartition("/")[2]
  varying = [len({parts[i] for parts in groups}) > 1 for i in range(len(PARTS))]
  return [
    Run(
      label=" \u00b7 ".join([label, *(p for p, v in zip(parts, varying, strict=True) if v and p)]),
      path=path,
      training=training,
      parts=parts,
      attempts={k: [turns[t] for t in sorted(turns)] for k, turns in attempts.items()},
    )
    for parts, attempts in groups.items()
  ]


def own_label(path: Path) -> str:
  """The label of the eval_summary.json beside it, where all its rows have the same."""
  rows = reading.read_object(path.with_name("eval_summary.json"), []).get("rows")
  rows = rows if isinstance(rows, list) else ()
  labels = {name(r.get("label")) for r in rows if isinstance(r, dict)}
  return labels.pop() if len(labels) == 1 else ""


def index_of(row: dict, problems: list[Problem], seen: dict) -> int:
  """The index of the row's problem in `problems`, which gets it where it is new.

  The same words in the same benchmark are one problem, whatever their ids; so are the same words in
  a benchmark and in rows that name none.
  """
  text = statement_of(row)
  words = " ".join(text.split()) if isinstance(text, str) else reading.dump(text)
  new = Problem(
    id=name(row.get("problem_id")),
    statement=clean(text, LONGEST_STATEMENT),
    **{k: name(row.get(k)) for k in ("benchmark", "category", "level")},
  )
  at = seen.setdefault(words, {})  # index by benchmark
  if not new.benchmark and at:
    return next(iter(at.values()))
  if new.benchmark not in at and "" in at:
    at[new.benchmark] = at.pop("")
    problems[at[new.benchmark]] = new
  if new.benchmark not in at:
    at[new.benchmark] = len(problems)
    problems.append(new)
  return at[new.benchmark]


def sample_of(row: dict, training: bool) -> str:
  """What tells an attempt from the others at its problem.

  In training the step counts too. Where people graded, every proof is an attempt of its own.
  """
  sample = name(row.get("sample", row.get("attempt")))
  if training:
    return f"step {name(row.get('step'))}, attempt {sample}"
  if "human_score" in row:
    proof = zlib.crc32(reading.dump(row.get("proof")).encode("utf-8", "replace"))
    return f"{sample}, proof {proof:08x}".lstrip(", ")
  return sample
