"""tools/bench_report.py: what it measures is there, on a small page."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.chromium import PROGRAM

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(PROGRAM is None, reason="no chromium here")
def test_a_small_page_is_measured():
  """The last line is JSON with every figure, and the events come in their order."""
  flags = ["--attempts=24", "--samples=2", "--reasoning=500", "--proof=300", "--repeats=1"]
  done = subprocess.run(
    [sys.executable, "tools/bench_report.py", *flags],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  figures = json.loads(done.stdout.splitlines()[-1])
  assert figures["attempts"] == 24 and figures["megabytes"] > 0
  assert 0 < figures["list_ms"] <= figures["ready_ms"]
  assert figures["frames_per_s"] > 0 and figures["show_ms"] > 0
