"""Rows of Parquet, JSONL, JSON and CSV files, local or on the hub, with an account of bad ones.

Distilled data holds broken rows. A bad row is counted, named and skipped; only a share of them
that points at the wrong file or column stops the program.
"""

import csv
import dataclasses
import fnmatch
import json
import logging
import math
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import huggingface_hub
import pyarrow.parquet

from qed_jax.data import hub

T = TypeVar("T")
Row = dict[str, Any]
SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
NAMED = 10  # bad rows that get a line of their own in the log


@dataclasses.dataclass(frozen=True)
class BadRow:
  """A faulty row. `row` counts from 1 in its file: the line of a JSONL file, else the record."""

  file: str
  row: int
  why: str

  def __str__(self) -> str:
    return f"{self.file} row {self.row}: {self.why}"


@dataclasses.dataclass(frozen=True)
class Report:
  """What became of the rows: read = kept + filtered + len(bad).

  bad: rows that were skipped. repaired: rows that were kept or filtered after a known fault in them
  was mended.
  """

  read: int
  kept: int
  filtered: int
  bad: tuple[BadRow, ...]
  repaired: tuple[BadRow, ...] = ()


class Ragged(ValueError):
  """A CSV record whose number of fields is not the header's; a repair may know what happened."""

  def __init__(self, header: list[str], fields: list[str]):
    super().__init__(f"has {len(fields)} fields, the header has {len(header)}")
    self.header, self.fields = header, fields


def load(
  path_or_hub_id: str | pathlib.Path,
  parse: Callable[[Row], T | None],
  *,
  revision: str | None,
  config: str,
  split: str,
  max_bad_share: float,
  repair: Callable[[Row | Ragged], tuple[Row, str] | None] = lambda _: None,
) -> tuple[list[T], Report]:
  """Every row that `parse` accepts, in file order.

  parse: row -> what to keep, or None to leave a good row out; raises ValueError(why) on a bad row.
  repair: (mended row, what was wrong) where it knows the fault of a row or a ragged record.
  config, split: which files of a folder or hub dataset; not looked at when the path is a file.
  Raises ValueError in one line when nothing is left or more than max_bad_share of the rows is bad.
  """
  kept, bad, repaired, read = [], [], [], 0
  for file in find(path_or_hub_id, revision=revision, config=config, split=split):
    for number, row in _rows(file):
      read += 1
      try:
        if isinstance(row, dict | Ragged) and (mended := repair(row)):
          row, why = mended
          repaired.append(BadRow(file.name, number, why))
          logging.warning("repaired %s", repaired[-1])
        if isinstance(row, Exception):
          raise row
        if not isinstance(row, dict):
          raise ValueError(f"is a {type(row).__name__}, not an object with columns")
        parsed = parse(row)
        if parsed is not None:
          kept.append(parsed)
      except ValueError as error:
        bad.append(BadRow(file.name, number, str(error)))
        if len(bad) <= NAMED:
          logging.warning("skipped %s", bad[-1])
  filtered = read - len(kept) - len(bad)
  report = Report(read, len(kept), filtered, tuple(bad), tuple(repaired))
  if bad:
    logging.warning("skipped %d bad rows of %d in %s", len(bad), read, path_or_hub_id)
  if len(bad) > max_bad_share * read:
    raise ValueError(
      f"{len(bad)} of {read} rows of {path_or_hub_id} are bad, more than "
      f"max_bad_share={max_bad_share}; the first is {bad[0]}"
    )
  if not kept:
    raise ValueError(
      f"no row of {path_or_hub_id} is left ({read} read, {report.filtered} filtered out, "
      f"{len(bad)} bad); check path, config, split and filters"
    )
  return kept, report


def find(
  path_or_hub_id: str | pathlib.Path, *, revision: str | None, config: str, split: str
) -> list[pathlib.Path]:
  """The data files of a file, a folder or a hub dataset, in name order.

  A folder's or dataset's README may list the files of each config and split, as the hub's dataset
  cards do; otherwise they are {split}-*, {split}.* or {split}/* in the folder named as the config
  ("data" or the top folder for the config "default"). Raises ValueError in one line.
  """
  path = pathlib.Path(path_or_hub_id)
  if path.is_file():
    return [path]
  if not path.is_dir():
    name = str(path_or_hub_id)
    if not hub.is_hub_id(name) or path.suffix in SUFFIXES:
      raise ValueError(f"data file or folder {name!r} does not exist")
    path = hub.fetch(name, kind="dataset", revision=revision, patterns=["README.md"])
    patterns = [p for group in _patterns(path, config, split) for p in group]
    path = hub.fetch(name, kind="dataset", revision=revision, patterns=["README.md", *patterns])
  names = sorted(
    file.relative_to(path).as_posix()
    for file in path.rglob("*")
    if file.suffix in SUFFIXES and file.is_file()
  )
  for group in _patterns(path, config, split):
    found = [name for name in names if any(fnmatch.fnmatch(name, p) for p in group)]
    if found:
      return [path / name for name in found]
  raise ValueError(
    f"{path_or_hub_id} has no files for config {config!r}, split {split!r}; "
    f"it has {', '.join(names[:5]) or 'no data files'}"
  )


def text(row: Row, names: Sequence[str], *, required: bool) -> str:
  """The text in the first of the columns `names` that the row has, stripped; "" for none.

  Numbers are written out. Raises ValueError(why) for another type, for text that is not Unicode,
  and for a missing, empty or NaN value when it is required.
  """
  filled = [n for n in names if row.get(n) not in (None, "", b"")]
  name = next(iter(filled or [n for n in names if n in row]), names[0])
  value = row.get(name)
  if value is None:
    value = ""
    if required:
      raise ValueError(f"{name} is missing")
  if isinstance(value, bytes):
    value = value.decode(errors="surrogateescape")
  if isinstance(value, float) and math.isnan(value):
    if required:
      raise ValueError(f"{name} is NaN")
    value = ""
  if isinstance(value, int | float) and not isinstance(value, bool) and not required:
    value = str(value)
  if not isinstance(value, str):
    raise ValueError(f"{name} is of type {type(value).__name__}, not text")
  try:
    value.encode()
  except UnicodeEncodeError:
    raise ValueError(f"{name} holds characters that are not Unicode text") from None
  value = value.strip()
  if required and not value:
    raise ValueError(f"{name} is empty")
  return value


def number(row: Row, name: str) -> float:
  """The finite number in a column. Raises ValueError(why)."""
  value = row.get(name)
  if isinstance(value, str):
    try:
      value = float(value)
    except ValueError:
      raise ValueError(f"{name} is {value!r}, not a number") from None
  if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
    raise ValueError(f"{name} is {value!r}, not a finite number")
  return float(value)


def _patterns(folder: pathlib.Path, config: str, split: str) -> list[list[str]]:
  """Groups of file patterns; the first group that finds files counts."""
  card = folder / "README.md"
  configs = (huggingface_hub.metadata_load(card) or {}).get("configs") if card.is_file() else None
  for entry in configs or []:
    if entry.get("config_name") != config:
      continue
    files = entry.get("data_files") or []
    # A card may name files without splits, which then all belong to "train".
    files = [files] if isinstance(files, str | dict) else files
    files = [{"split": "train", "path": f} if isinstance(f, str) else f for f in files]
    paths = [f["path"] for f in files if f.get("split") == split]
    return [[p for path in paths for p in ([path] if isinstance(path, str) else path)]]
  prefixes = ("data/", "") if config == "default" else (f"{config}/", f"{config}-")
  return [[f"{prefix}{split}{tail}" for tail in ("-*", ".*", "/*")] for prefix in prefixes]


def _rows(file: pathlib.Path) -> Iterator[tuple[int, Any]]:
  """(number from 1, row or the ValueError that says why there is none)."""
  if file.suffix == ".parquet":
    return _parquet(file)
  if file.suffix == ".csv":
    return _csv(file)
  if file.suffix == ".jsonl":
    return _jsonl(file)
  if file.suffix == ".json":
    return _json(file)
  raise ValueError(f"{file} has suffix {file.suffix!r}; give one of {', '.join(SUFFIXES)}")


def _parquet(file: pathlib.Path) -> Iterator[tuple[int, Any]]:
  number = 0
  try:
    with pyarrow.parquet.ParquetFile(file) as table:
      # Small batches: one row of FineProofs-SFT can be half a megabyte.
      for batch in table.iter_batches(batch_size=64):
        for i in range(batch.num_rows):
          number += 1
          try:
            row = batch.slice(i, 1).to_pylist()[0]
          except UnicodeDecodeError as error:
            row = ValueError(f"is not UTF-8 text ({error.reason})")
          yield number, row
  except (pyarrow.ArrowException, OSError) as error:
    reason = str(error).strip().partition("\n")[0]
    raise ValueError(
      f"{file} is not a whole Parquet file ({reason}, after row {number}); fetch it again"
    ) from error


def _jsonl(file: pathlib.Path) -> Iterator[tuple[int, Any]]:
  with file.open("rb") as lines:
    for number, line in enumerate(lines, 1):
      if line.strip():
        yield number, _parsed(line)


def _json(file: pathlib.Path) -> Iterator[tuple[int, Any]]:
  rows = _parsed(file.read_bytes())
  if not isinstance(rows, list):
    reason = rows if isinstance(rows, Exception) else f"is a {type(rows).__name__}"
    raise ValueError(f"{file} is not a JSON list of rows ({reason}); name JSON lines .jsonl")
  yield from enumerate(rows, 1)


def _parsed(line: bytes) -> Any:
  try:
    return json.loads(line)
  except (ValueError, RecursionError) as error:
    return ValueError(f"is not JSON ({error})")


def _csv(file: pathlib.Path) -> Iterator[tuple[int, Any]]:
  csv.field_size_limit(sys.maxsize)
  # Bytes that are not UTF-8 stay visible to the check of the field they are in.
  with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
    reader = csv.reader(lines)
    header = next(reader, [])
    for number, fields in enumerate(_records(reader), 1):
      if isinstance(fields, Exception):
        yield number, fields
      elif len(fields) != len(header):
        yield number, Ragged(header, fields)
      else:
        yield number, dict(zip(header, fields, strict=True))


def _records(reader: Iterable[list[str]]) -> Iterator[list[str] | ValueError]:
  reader = iter(reader)
  while True:
    try:
      fields = next(reader)
    except StopIteration:
      return
    except csv.Error as error:
      yield ValueError(f"is not CSV ({error})")
      continue
    if fields:
      yield fields
