"""Evaluation: python -m qed_jax.evaluate --config=configs/evaluate.py:tiny --workdir=runs/eval

Each problem runs through the turns of the reasoning cache, every turn's proof is graded, and the
rows go to eval.jsonl as blocks of problems finish; what is there already is not asked for again.
eval_summary.json holds the scores with 95 % bootstrap intervals over problems: by turn, and by
level of the problem. A proof that could not be graded is counted, never a zero.
"""

import asyncio
import collections
import json
import os

from etils import epath

from qed_jax import flags, intervals, prompts, sharding, workdir
from qed_jax.chat import Endpoint, HttpChat
from qed_jax.data import problems as problem_files
from qed_jax.data import tiny_world
from qed_jax.data import tokenizer as tokenizers
from qed_jax.records import Problem
from qed_jax.rollout import jobs, policy
from qed_jax.rollout.engine_chat import EngineChat
from qed_jax.rollout.experience import sampling
from qed_jax.scaffolds.proof import split_proof
from qed_jax.scaffolds.reasoning_cache import solve, turn_seed

ROWS, SUMMARY = "eval.jsonl", "eval_summary.json"


def main(config, folder: str) -> None:
  root = epath.Path(folder)
  workdir.check_same_config(root, config.to_dict(), ignore=("label", "judge", "problems_at_once"))
  problems = read_problems(config)
  rows = read_rows(root / ROWS, config.cache.turns)
  done = {(row["problem_id"], row["sample"]) for row in rows}
  wanted = [(p, s) for p in problems for s in range(config.samples_per_problem)]
  missing = [(p, s) for p, s in wanted if (p.id, s) not in done]
  if missing:
    chat, summariser = open_chat(config), None
    if config.cache.summariser:
      revision = config.cache.summariser_revision
      summariser = load_chat(config, config.cache.summariser, revision, "config.cache.summariser")
    grade = jobs.grader(config.judge, root)
    workdir.write_run_files(root, config.to_dict())
    for start in range(0, len(missing), config.problems_at_once):
      block = missing[start : start + config.problems_at_once]
      new = asyncio.run(run_block(config, block, chat, summariser, grade))
      append_rows(root / ROWS, new)
      rows += new
      print(f"{config.label or config.policy}: {len(rows)} graded turns", flush=True)
  summary = summarise_rows(config, rows, len(wanted))
  (root / SUMMARY).write_text(json.dumps({"rows": [summary]}, indent=2) + "\n")
  print(table(summary), flush=True)


def read_problems(config) -> list[Problem]:
  """The first `data.problems` of the benchmark; of the tiny world, that many different ones."""
  block = config.data
  if block.source == jobs.TINY_WORLD:
    drawn = tiny_world.problems(config.seed, 2 * block.problems, block.split)
    return list({problem.id: problem for problem in drawn}.values())[: block.problems]
  found, report = problem_files.load(
    block.source,
    revision=block.revision,
    config="default",
    split=block.split,
    require=("answer",) if config.judge.reward == "answer" else ("rubric",),
    reward_range=None,
    max_bad_share=block.max_bad_share,
  )
  for bad in report.bad:
    print(f"skipped {bad}", flush=True)
  return found[: block.problems]


def open_chat(config):
  """The policy as a chat: a server's, or an engine in this process."""
  if config.endpoint.model:
    base_url = os.environ.get(config.endpoint.base_url_env)
    if not base_url:
      raise ValueError(f"config.endpoint.model is set, but {config.endpoint.base_url_env} is not")
    key = config.endpoint.api_key_env
    return HttpChat(
      Endpoint(base_url, config.endpoint.model, key_env=key if key in os.environ else ""),
      concurrency=config.endpoint.concurrency,
      timeout=config.endpoint.timeout_s,
      deadline=config.endpoint.deadline_s,
      attempts=config.endpoint.retries,
    )
  if not config.policy:
    raise ValueError("config.policy is empty: name a workdir, a Hugging Face folder or a hub id")
  revision, untrained = config.policy_revision, config.untrained
  return load_chat(config, config.policy, revision, "config.policy", untrained)


def load_chat(config, name: str, revision: str, field: str, untrained: bool = False):
  """The chat of an engine with the parameters that `name`, the value of `field`, stands for."""
  start = policy.locate(name, revision, field)
  model = policy.sizes(start, config.model)
  mesh = sharding.make_mesh(**config.mesh.to_dict())
  tokenizer = tokenizers.load(start.folder)
  if untrained:
    start = policy.Start("random", "untrained")
  abstract = policy.abstract_params(model, mesh, config.model.dtype)
  engine = jobs.make_engine(model, mesh, config.rollout, tokenizer)
  engine.set_params(policy.load_params(start, model, abstract, config.seed), 0)
  return EngineChat(engine, tokenizer, config.seed).chat


async def run_block(config, block, chat, summariser, grade) -> list[dict]:
  """Rows of some (problem, sample) pairs, one a turn."""

  async def one(problem: Problem, sample: int) -> list[dict]:
    solution = await solve(
      problem,
      chat,
      turns=config.cache.turns,
      reason_template=prompts.load(config.cache.prompt),
      summarise_template=prompts.load(config.cache.summarise),
      reason=sampling(config.rollout),
      summarise_sampling=sampling(config.cache),
      seed=turn_seed(config.seed, problem.id, sample),
      summariser=summariser,
    )
    grades = await asyncio.gather(*(grade(problem, turn.proof) for turn in solution.turns))
    return [row(problem, sample, turn, g) for turn, g in zip(solution.turns, grades, strict=True)]

  return [r for rows in await asyncio.gather(*(one(p, s) for p, s in block)) for r in rows]


def row(problem: Problem, sample: int, turn, grade) -> dict:
  """One graded turn, as eval.jsonl holds it."""
  return {
    "problem_id": problem.id,
    "problem": problem.statement,
    "rubric": problem.rubric,
    "level": problem.level,
    "sample": sample,
    "turn": turn.index,
    "summary": turn.summary_before,
    "reasoning": split_proof(turn.completion.text)[0],
    "proof": turn.proof,
    "score": grade.score,
    "reason": grade.reason,
    "feedback": grade.feedback,
    "finish_reason": turn.completion.finish_reason,
    "tokens": turn.completion.usage.output_tokens,
    "summary_tokens": turn.summary_completion.usage.output_tokens if turn.summary_completion else 0,
  }


def read_rows(path: epath.Path, turns: int) -> list[dict]:
  """Rows of the runs that have all their turns. A line torn by a kill is left out, and the runs
  without all turns are asked for again; of two rows for the same turn the later one counts."""
  rows = {}
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      found = json.loads(line)
    except ValueError:
      print(f"{path}: left out a torn line", flush=True)
      continue
    rows[found["problem_id"], found["sample"], found["turn"]] = found
  complete = collections.Counter(key[:2] for key in rows)
  return [row for key, row in rows.items() if complete[key[:2]] == turns]


def append_rows(path: epath.Path, rows: list[dict]) -> None:
  """Adds whole lines and waits until they are on disk."""
  torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
  with path.open("a") as file:
    file.write("\n" * torn + "".join(json.dumps(r) + "\n" for r in rows))
    file.flush()
    if hasattr(file, "fileno"):
      os.fsync(file.fileno())


def summarise_rows(config, rows: list[dict], wanted: int) -> dict:
  """Mean scores (0..7) with intervals: the last turn's, by turn, and by level at first and last."""
  turns = sorted({r["turn"] for r in rows})

  def score(turn: int, level: str | None = None) -> dict:
    by_problem = collections.defaultdict(list)
    for r in rows:
      if r["turn"] == turn and level in (None, r["level"]) and r["score"] is not None:
        by_problem[r["problem_id"]].append(r["score"])
    means = [sum(scores) / len(scores) for scores in by_problem.values()]
    if not means:
      return {"turn": turn, "score": None, "low": None, "high": None, "n": 0}
    mean, low, high = intervals.bootstrap(means, config.seed)
    return {"turn": turn, "score": mean, "low": low, "high": high, "n": len(means)}

  levels = sorted({r["level"] for r in rows}, key=lambda x: (len(x), x))
  last = turns[-1]
  return {
    "label": config.label or config.policy or config.endpoint.model,
    "scaffold": "reasoning_cache",
    "turns": last,
    **{k: v for k, v in score(last).items() if k != "turn"},
    "single_pass": score(1),
    "by_turn": [score(t) for t in turns],
    "by_length": [{"length": x, **score(last, x), "single_pass": score(1, x)} for x in levels],
    "invalid": sum(r["score"] is None for r in rows),
    "missing": wanted - len({(r["problem_id"], r["sample"]) for r in rows}),
    "truncated": sum(r["finish_reason"] == "length" for r in rows) / max(len(rows), 1),
    "tokens_per_turn": sum(r["tokens"] + r["summary_tokens"] for r in rows) / max(len(rows), 1),
  }


def table(summary: dict) -> str:
  """The summary as text for the terminal."""
  lines = [f"{summary['label']}: mean score of 7, 95 % interval, by turn"]
  for entry in summary["by_turn"]:
    if entry["score"] is None:
      lines.append(f"  turn {entry['turn']}: no grade")
    else:
      lines.append(
        f"  turn {entry['turn']}: {entry['score']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]"
      )
  lines.append(f"  n={summary['n']} invalid={summary['invalid']} missing={summary['missing']}")
  return "\n".join(lines)


if __name__ == "__main__":
  flags.run(main)
