"""Where the real IMO-Bench files are, for tests that read them; they are no part of the project."""

import os
from pathlib import Path

import pytest

FOLDER = Path(
  os.environ.get("IMOBENCH") or Path(__file__).parents[2] / "shared" / "data" / "imobench"
)


def file(name: str) -> Path:
  """The path of answerbench_v2.csv or proofbench_v2.csv; skips the test when it is not there."""
  if not (FOLDER / name).is_file():
    pytest.skip(f"no {name}: clone superhuman/imobench (CC-BY-4.0) and set IMOBENCH to its folder")
  return FOLDER / name
