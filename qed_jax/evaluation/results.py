"""eval.jsonl: an append-only file of rows that survives a kill at any moment.

The rows of a (problem, sample) pair are appended together, and are on disk when `append` returns.
A kill in the middle of that leaves some of them, or part of a line; whoever opens the file next
takes these out, so that a pair is there whole or not at all. What is taken out is kept beside it,
in eval.jsonl.removed.
"""

import fcntl
import json
import os
import time
from collections.abc import Sequence

from etils import epath

ROWS, SUMMARY = "eval.jsonl", "eval_summary.json"
NEEDED = ("problem_id", "sample", "turn", "turns", "score")
REMOTE_SECONDS = 30.0  # object stores cannot append: the whole file is written again this often


class Results:
  """The rows of a folder, and the right to add to them: one process at a time.

  Raises ValueError when another process has the folder open.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = epath.Path(path)
    self._remote = "://" in os.fspath(path)
    self._lock = self._file = None
    self._written = 0.0
    self.path.parent.mkdir(parents=True, exist_ok=True)
    if not self._remote:
      self._lock = os.open(self.path.parent, os.O_RDONLY)
      try:
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except OSError:
        os.close(self._lock)
        raise ValueError(
          f"another process is writing {self.path}: wait for it, or use another --workdir"
        ) from None
    text = self.path.read_text() if self.path.exists() else ""
    self.rows, removed = read(text)
    if removed:
      print(f"{self.path}: took out {len(removed)} line(s) that a kill left unfinished", flush=True)
      kept = epath.Path(f"{os.fspath(self.path)}.removed")
      kept.write_text((kept.read_text() if kept.exists() else "") + "\n".join(removed) + "\n")
    if removed or text[-1:] not in ("", "\n"):
      self._write_all()
    self._open()

  def append(self, rows: Sequence[dict]) -> None:
    """Adds the rows of a pair. Raises OSError when the disk refuses."""
    self.rows += rows
    if self._remote:
      if time.monotonic() - self._written > REMOTE_SECONDS:
        self._write_all()
      return
    data = "".join(map(_line, rows)).encode()
    while data:
      data = data[os.write(self._file, data) :]
    os.fsync(self._file)

  def replace(self, rows: Sequence[dict]) -> None:
    """Other rows for the same proofs, all at once or, after a kill, none."""
    self.rows = list(rows)
    self._write_all()
    self._open()

  def close(self) -> None:
    if self._remote:
      self._write_all()
    if self._file is not None:
      os.close(self._file)
    if self._lock is not None:
      os.close(self._lock)
    self._file = self._lock = None

  def __enter__(self) -> "Results":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _open(self) -> None:
    if self._remote:
      return
    if self._file is not None:
      os.close(self._file)
    self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.fsync(self._lock)  # the folder, which says that the file is there

  def _write_all(self) -> None:
    unfinished = epath.Path(f"{os.fspath(self.path)}.tmp")
    with unfinished.open("w") as file:
      file.write("".join(map(_line, self.rows)))
      file.flush()
      if not self._remote:
        os.fsync(file.fileno())
    unfinished.replace(self.path)
    self._written = time.monotonic()


def _line(row: dict) -> str:
  return json.dumps(row) + "\n"


def read(text: str) -> tuple[list[dict], list[str]]:
  """(rows of whole pairs, the other lines). Of two rows for one turn the later one counts."""
  rows: dict[tuple, dict] = {}
  lines: dict[tuple, str] = {}
  removed = []
  for line in text.split("\n"):
    try:
      row = json.loads(line)
      key = tuple(row[name] for name in NEEDED[:3])
      complete = isinstance(row["turns"], int) and "score" in row
    except (ValueError, KeyError, TypeError, RecursionError):
      complete = False
    if not complete:
      removed += [line] if line.strip() else []
      continue
    if key in rows:
      removed.append(lines.pop(key))
      del rows[key]
    rows[key], lines[key] = row, line
  found: dict[tuple, set] = {}
  for problem, sample, turn in rows:
    found.setdefault((problem, sample), set()).add(turn)
  whole = {pair for pair, turns in found.items() if len(turns) == _turns(rows, pair, turns)}
  removed += [line for key, line in lines.items() if key[:2] not in whole]
  return [row for key, row in rows.items() if key[:2] in whole], removed


def _turns(rows: dict, pair: tuple, turns: set) -> int:
  return max(rows[*pair, turn]["turns"] for turn in turns)


def load(run: str | os.PathLike) -> list[dict]:
  """The rows of a workdir, or of the eval.jsonl itself; a run that goes on may be read too.

  Raises ValueError, one line, when there are none.
  """
  path = epath.Path(run)
  path = path / ROWS if path.is_dir() else path
  if not path.exists():
    raise ValueError(f"{path} is not there: name the workdir of an evaluation")
  rows, _ = read(path.read_text())
  if not rows:
    raise ValueError(f"{path} has no finished rows: run the evaluation to its end first")
  return rows
