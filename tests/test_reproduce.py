"""docs/reproduce.md: its commands name programs, configs, variants, fields and flags that exist."""

import re
import shlex

import pytest
from test_readme import ROOT, mistakes

from configs import curate

PAGE = (ROOT / "docs" / "reproduce.md").read_text()
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.S))
COMMANDS = [
  shlex.split(line.replace("$CURATE", "python -m qed_jax.curate"), comments=True)
  for line in BLOCKS.splitlines()
  if line.startswith(("python ", "$CURATE "))
]


@pytest.mark.parametrize("words", [c for c in COMMANDS if "tools/plan.py" not in c])
def test_commands_parse(words):
  assert mistakes(words[1:]) == []


def test_the_page_runs_every_job_and_stage():
  """Each job of the data program and each stage of training has its command."""
  for job in set(curate.JOBS):
    assert f"configs/curate.py:{job} " in BLOCKS
  for stage in ("sft", "rl", "cache_rl"):
    assert f"configs/{stage}.py " in BLOCKS
  assert len(COMMANDS) > 12
