"""The README of a dataset: the header that the hub reads, counts, columns, provenance.

Provenance is a list of steps, the oldest first; each job adds one to those of its source.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import huggingface_hub

PROVENANCE, README = "provenance.json", "README.md"
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"))


@dataclasses.dataclass(frozen=True)
class Step:
  """One job. source: what it read, at `revision` if that was on the hub; sha256: of those files.
  details: model, prompts, settings and counts, as JSON values."""

  job: str
  source: str
  revision: str
  sha256: str
  rows_in: int
  rows_out: int
  details: Mapping[str, Any]


def card(
  *,
  title: str,
  license: str,
  files: str,
  rows: int,
  columns: Mapping[str, str],
  steps: Sequence[Step],
) -> str:
  """The text of README.md. files: glob of the data files. columns: type by name."""
  size = next((name for bound, name in _SIZES if rows < bound), "n>1M")
  header = huggingface_hub.DatasetCardData(
    license=license,
    language="en",
    pretty_name=title,
    size_categories=size,
    task_categories=["text-generation"],
    tags=["mathematics", "proofs"],
    configs=[{"config_name": "default", "data_files": [{"split": "train", "path": files}]}],
  )
  lines = ["---", header.to_yaml(), "---", "", f"# {_plain(title)}", ""]
  lines += [f"{rows:,} rows, one split (`train`). Licence: {license}.", ""]
  if license == "unknown":
    lines += ["The licence of the source was not stated: settle it before this is published.", ""]
  lines += ["## Columns", "", "| column | type |", "|---|---|"]
  lines += [f"| `{_plain(name)}` | {_plain(kind)} |" for name, kind in columns.items()]
  lines += ["", "## Provenance", "", "Each step read what the one before it wrote.", ""]
  lines += ["| step | job | read | rows in | rows out |", "|---|---|---|---|---|"]
  for i, step in enumerate(steps, 1):
    at = f" at {step.revision}" if step.revision else ""
    read = f"`{_plain(step.source)}`{_plain(at)}, sha256 {step.sha256[:16]}"
    lines.append(f"| {i} | {step.job} | {read} | {step.rows_in:,} | {step.rows_out:,} |")
  for i, step in enumerate(steps, 1):
    lines += ["", f"**{i}. {step.job}**", ""]
    lines += [f"* {_plain(name)}: {_plain(value)}" for name, value in step.details.items()]
  return "\n".join(lines) + "\n"


def read_steps(folder: pathlib.Path) -> list[Step]:
  """The steps of a folder that a job wrote; none for any other."""
  try:
    return [Step(**step) for step in json.loads((folder / PROVENANCE).read_text())]
  except (OSError, ValueError, TypeError):
    return []


def read_license(folder: pathlib.Path) -> str:
  """The licence in the header of a folder's README, "unknown" where there is none."""
  path = folder / README
  try:
    header = huggingface_hub.metadata_load(path) if path.is_file() else None
  except ValueError:
    header = None
  found = (header or {}).get("license")
  return found if isinstance(found, str) and found else "unknown"


def _plain(value: Any) -> str:
  text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
  return " ".join(text.split()).replace("|", "\\|")
