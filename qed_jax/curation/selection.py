"""Which rows stay: by difficulty, by distance from the benchmarks, and one of each problem."""

import collections
import pathlib
import re

from qed_jax.curation.dataset import Item, Outcome
from qed_jax.data import benchmarks, decontamination, rows


async def select(config, root: pathlib.Path, items: list[Item]) -> Outcome:
  """Rows whose difficulty (columns of the job `difficulty`) config.select asks for.

  Raises ValueError in one line when the columns are not there.
  """
  block, kept, dropped = config.select, [], []
  if block.min_reward_mean > block.max_reward_mean:
    raise ValueError(
      f"config.select.min_reward_mean is {block.min_reward_mean}, over max_reward_mean "
      f"{block.max_reward_mean}: no row can lie between"
    )
  for item in items:
    try:
      mean, count = rows.number(item.row, "reward_mean"), rows.number(item.row, "num_rewards")
    except ValueError as error:
      raise ValueError(
        f"problem {item.problem.id}: {error}; run the job `difficulty` on these rows first"
      ) from error
    why = ""
    if count < block.min_grades:
      why = f"only {count:.0f} grades"
    elif not block.min_reward_mean <= mean <= block.max_reward_mean:
      why = f"reward_mean {mean:.3f}"
    elif block.drop_never_solved and mean == 0:
      why = "never scored a point"
    if why:
      dropped.append({"why": why} | item.row)
    else:
      kept.append(item.row)
  return Outcome(kept, dropped, 0, len(items), {"rule": block.to_dict()})


async def decontaminate(config, root: pathlib.Path, items: list[Item]) -> Outcome:
  """Rows unlike every benchmark problem; the others with whom they match, how much, and where."""
  block = config.decontaminate
  _check_threshold(block.threshold, "decontaminate")
  index = decontamination.Index([], n=block.ngram)
  sizes = {}
  for name, place in block.benchmarks.items():
    if not place.source:
      continue
    found, _ = benchmarks.load(
      place.source,
      revision=place.revision,
      split=place.split,
      max_bad_share=config.data.max_bad_share,
    )
    sizes[name] = len(found)
    for problem in found:
      index.add(f"{name}/{problem.id}", problem.statement)
  if not len(index):
    raise ValueError(
      "there is nothing to compare with: give config.decontaminate.benchmarks.NAME.source"
    )
  try:
    excluded = re.compile(block.exclude) if block.exclude else None
  except re.error as error:
    raise ValueError(
      f"config.decontaminate.exclude is {block.exclude!r}, not a regular expression ({error})"
    ) from error
  kept, dropped, counts = [], [], collections.Counter()
  for item in items:
    said = f"{item.row.get('competition') or ''} {item.problem.source}"
    if excluded and excluded.search(said):
      dropped.append({"why": f"source {said.strip()!r}"} | item.row)
      counts["excluded by source"] += 1
    elif match := index.match(item.problem.statement, threshold=block.threshold):
      told = {"why": f"{match.kind} match", "benchmark": match.id, "score": match.score}
      dropped.append(told | {"passage": match.passage} | item.row)
      counts[f"{match.kind} matches of {match.id.partition('/')[0]}"] += 1
    else:
      kept.append(item.row)
  details = {"benchmarks": sizes, "n-gram": block.ngram, "threshold": block.threshold}
  return Outcome(kept, dropped, 0, len(items), details | dict(sorted(counts.items())))


async def deduplicate(config, root: pathlib.Path, items: list[Item]) -> Outcome:
  """The first row of each problem; the others with the row that they match."""
  block = config.deduplicate
  _check_threshold(block.threshold, "deduplicate")
  index = decontamination.Index([], n=block.ngram)
  kept, dropped, counts = [], [], collections.Counter()
  for item in items:
    if match := index.match(item.problem.statement, threshold=block.threshold):
      told = {"why": f"{match.kind} match", "first": match.id, "score": match.score}
      dropped.append(told | {"passage": match.passage} | item.row)
      counts[f"{match.kind} matches"] += 1
    else:
      index.add(item.problem.id, item.problem.statement)
      kept.append(item.row)
  details = {"n-gram": block.ngram, "threshold": block.threshold}
  return Outcome(kept, dropped, 0, len(items), details | dict(sorted(counts.items())))


def _check_threshold(value: float, name: str) -> None:
  if not 0 < value <= 1:
    raise ValueError(f"config.{name}.threshold is {value}: give a share above 0, at most 1")
