"""Files of runs read with tolerance: what is broken is counted and named."""

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

STAGES = ("untrained", "sft", "rl", "cache_rl")
PRUNED = {"checkpoints", "tb", "__pycache__"}
LONGEST_TEXT = 6_000  # characters of a text in the static part of the page
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def find(roots: Sequence[Path], name: str) -> list[tuple[str, Path]]:
  """(run, path) of the files of this name in the roots and below, stages in the order of training.

  A run is named by its place under its root; with several roots the root's name comes before it.
  """
  found: dict[Path, str] = {}
  for root in roots:
    places = []
    for folder, folders, files in os.walk(root):
      folders[:] = [f for f in folders if f not in PRUNED]
      if name in files:
        places.append(Path(folder).relative_to(root).parts)
    places.sort(key=lambda parts: [(order(p), p) for p in parts])
    for parts in places:
      own = root.resolve().name
      run = (own, *parts) if len(roots) > 1 or not parts else parts
      found.setdefault((root / Path(*parts) / name).resolve(), clean("/".join(run)))
  return [(run, path) for path, run in found.items()]


def order(part: str) -> int:
  return STAGES.index(part) if part in STAGES else len(STAGES)


def clip(text: str, longest: int | None = LONGEST_TEXT) -> str:
  """The text, without the middle of a very long one. longest: characters, None for any number."""
  if longest is None or len(text) <= longest:
    return text
  tail = longest // 3
  left_out = f"\n[... {len(text) - longest:,} characters left out ...]\n"
  return text[: longest - tail] + left_out + text[len(text) - tail :]


def clean(value: object, longest: int | None = LONGEST_TEXT) -> str:
  """Anything as text that can be shown: clipped, and control characters marked."""
  text = value if isinstance(value, str) else "" if value is None else dump(value)
  return UNSEEN.sub("\ufffd", clip(text.replace("\r\n", "\n"), longest))


def dump(value: object) -> str:
  try:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
  except (TypeError, ValueError, RecursionError):
    return "[a value that cannot be written as JSON]"


def parse(line: bytes) -> object:
  """The value of a line of JSON; None for an empty line, and a text for a broken one."""
  try:
    return json.loads(line.decode("utf-8", "replace")) if line.strip() else None
  except (ValueError, RecursionError):
    return "broken"


def lines(path: Path, notes: list[str]) -> Iterator[tuple[int, dict]]:
  """(byte at which it starts, row) of a JSONL file; lines that are no objects go into notes."""
  bad = at = 0
  try:
    with path.open("rb") as file:
      for line in file:
        row = parse(line)
        if isinstance(row, dict):
          yield at, row
        elif row is not None:
          bad += 1
        at += len(line)
  except OSError as error:
    absent = isinstance(error, FileNotFoundError)
    notes.append(f"{path.name} {'is not there' if absent else 'cannot be read'}.")
  if bad:
    notes.append(f"{path.name}: {bad} unreadable line{'s' * (bad > 1)} left out.")


def read_row(path: Path, at: int) -> dict:
  """The row that starts at this byte; {} where the file has changed since."""
  try:
    with path.open("rb") as file:
      file.seek(at)
      row = parse(file.readline())
  except OSError:
    return {}
  return row if isinstance(row, dict) else {}


def read_object(path: Path, notes: list[str]) -> dict:
  try:
    value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
  except FileNotFoundError:
    notes.append(f"{path.name} is not there.")
    return {}
  except (OSError, ValueError, RecursionError):
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
