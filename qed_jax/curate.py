"""Data building: python -m qed_jax.curate --config=configs/curate.py:JOB --workdir=DIR

A job reads rows (config.data), writes DIR/data/train-*, a card and dropped.jsonl, and ends with a
line of JSON. DIR is the source of the next job:

  teacher -> filter -> rubrics -> difficulty -> select -> decontaminate -> deduplicate

What a model was asked is on disk as it finishes: the same command goes on after a kill, and asks
only for what is missing.
"""

import asyncio
import json
from pathlib import Path

from qed_jax import flags, workdir
from qed_jax.curation import dataset, difficulty, quality, rubrics, selection, teacher

JOBS = {
  "teacher": teacher.run,
  "filter": quality.run,
  "rubrics": rubrics.run,
  "difficulty": difficulty.run,
  "select": selection.select,
  "decontaminate": selection.decontaminate,
  "deduplicate": selection.deduplicate,
}
# What may differ from the run that began the workdir: it changes no row that is there already.
MAY_DIFFER = ("concurrency", "max_failures", "max_missing_share", "samples_per_problem", "output")
MAY_DIFFER += tuple(
  f"{block}.{field}"
  for block in ("endpoint", "judge")
  for field in ("base_url_env", "api_key_env", "concurrency", "timeout_s", "deadline_s")
  + ("idle_s", "stream", "retries", "token_budget")
)


def main(config, folder: str) -> None:
  if "://" in folder:
    raise ValueError(f"--workdir is {folder}: its ledgers are appended to, give a local folder")
  root = Path(folder)
  if not config.data.source:
    raise ValueError("config.data.source is empty: name a file, a folder or a hub id with the rows")
  workdir.check_same_config(root, config.to_dict(), ignore=MAY_DIFFER)
  items, report = dataset.read(config.data)
  for fault in (*report.bad, *report.repaired):
    print(f"{'skipped' if fault in report.bad else 'repaired'} {fault}", flush=True)
  workdir.write_run_files(root, config.to_dict())
  outcome = asyncio.run(JOBS[config.task](config, root, items))
  if outcome.missing > config.max_missing_share * outcome.wanted:
    raise ValueError(
      f"{outcome.missing} of {outcome.wanted} are missing, more than max_missing_share="
      f"{config.max_missing_share}: what is finished is kept, run the same command again"
    )
  if not outcome.kept:
    raise ValueError(
      f"no row is left of {report.kept}: see the first reason, "
      f"{outcome.dropped[0]['why'] if outcome.dropped else 'none was finished'!r}, and the rules"
    )
  print(json.dumps(dataset.publish(root, config, report, outcome)), flush=True)


if __name__ == "__main__":
  flags.run(main)
