"""The rows that a job reads and the data set that it writes: files, card, what was left out."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import pyarrow
import pyarrow.parquet

from qed_jax.data import benchmarks, cards, problems, rows
from qed_jax.records import Problem

DROPPED = "dropped.jsonl"


@dataclasses.dataclass(frozen=True)
class Item:
  """A row, and what it says. solution: the reference, or the row's own proof."""

  problem: Problem
  solution: str
  row: rows.Row


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What a job made. kept: rows of the new set. dropped: {"why": ..., **row} of the others.
  missing: how many items could not be had, of `wanted`. details: for the card."""

  kept: list[rows.Row]
  dropped: list[rows.Row]
  missing: int
  wanted: int
  details: dict[str, Any]


def read(block) -> tuple[list[Item], rows.Report]:
  """The items of config.data: source, revision, subset, split, max_bad_share.

  Raises ValueError in one line as rows.load does.
  """

  def parse(row: rows.Row) -> Item:
    problem = problems.from_row(row, require=())
    solution = problem.solution or rows.text(row, ("proof",), required=False)
    return Item(problem, solution, row)

  return rows.load(
    block.source,
    parse,
    revision=block.revision,
    config=block.subset,
    split=block.split,
    max_bad_share=block.max_bad_share,
    repair=benchmarks.repair,
  )


def key(*texts: str) -> str:
  """What an item is known by in a ledger: a hash of all that it was asked about."""
  return hashlib.sha256("\0".join(texts).encode("utf-8", "replace")).hexdigest()[:24]


def publish(root: pathlib.Path, config, report: rows.Report, outcome: Outcome) -> dict[str, Any]:
  """Writes data/train-*, README.md, provenance.json and dropped.jsonl; returns the figures.

  Each file is replaced as a whole, so that a kill leaves the old or the new one.
  """
  details = outcome.details | {
    "bad rows left out": len(report.bad),
    "rows repaired": [str(fault) for fault in report.repaired],
    "missing": f"{outcome.missing} of {outcome.wanted}",
  }
  folder = pathlib.Path(config.data.source)
  is_hub = not folder.exists()
  step = cards.Step(
    job=config.task,
    source=folder.name if not is_hub else config.data.source,
    revision=config.data.revision if is_hub else "",
    sha256=_sha256(config.data),
    rows_in=report.read,
    rows_out=len(outcome.kept),
    details=details,
  )
  steps = [*cards.read_steps(folder), step]
  license = config.output.license or cards.read_license(folder)
  name = f"data/train-00000-of-00001.{config.output.format}"
  (root / "data").mkdir(parents=True, exist_ok=True)
  for old in (root / "data").glob("train-*"):
    if old.name != pathlib.Path(name).name:
      old.unlink()  # of the other format: the set would have every row twice
  write_rows(root / name, outcome.kept)
  write_rows(root / DROPPED, outcome.dropped)
  columns = {}
  for row in outcome.kept:
    for column, value in row.items():
      if column not in columns or columns[column] == "null":
        columns[column] = "null" if value is None else type(value).__name__
  text = cards.card(
    title=config.output.title or root.name,
    license=license,
    files="data/train-*",
    rows=len(outcome.kept),
    columns=columns,
    steps=steps,
  )
  _replace(root / cards.README, text.encode())
  listed = [dataclasses.asdict(step) for step in steps]
  _replace(root / cards.PROVENANCE, (json.dumps(listed, indent=2) + "\n").encode())
  return {
    "task": config.task,
    "read": report.read,
    "bad": len(report.bad),
    "repaired": len(report.repaired),
    "kept": len(outcome.kept),
    "dropped": len(outcome.dropped),
    "missing": outcome.missing,
    "wanted": outcome.wanted,
  }


def write_rows(path: pathlib.Path, found: Sequence[rows.Row]) -> None:
  """Parquet or JSONL, by the suffix. Raises ValueError in one line for columns of mixed types."""
  if path.suffix == ".jsonl":
    _replace(path, "".join(json.dumps(row, default=str) + "\n" for row in found).encode())
    return
  columns = list(dict.fromkeys(name for row in found for name in row))
  buffer = pyarrow.BufferOutputStream()
  arrays = []
  for name in columns:
    try:
      arrays.append(pyarrow.array([row.get(name) for row in found]))
    except (pyarrow.ArrowException, OverflowError) as error:
      raise ValueError(
        f"column {name!r} mixes types that Parquet cannot hold ({str(error).splitlines()[0]}): "
        "set --config.output.format=jsonl, or mend the column"
      ) from error
  pyarrow.parquet.write_table(pyarrow.table(arrays, names=columns), buffer, compression="zstd")
  _replace(path, buffer.getvalue().to_pybytes())


def _replace(path: pathlib.Path, content: bytes) -> None:
  unfinished = path.with_name(path.name + ".tmp")
  with unfinished.open("wb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  unfinished.replace(path)


def _sha256(block) -> str:
  digest = hashlib.sha256()
  for file in rows.find(
    block.source, revision=block.revision, config=block.subset, split=block.split
  ):
    with file.open("rb") as data:
      digest.update(hashlib.file_digest(data, "sha256").digest())
  return digest.hexdigest()
