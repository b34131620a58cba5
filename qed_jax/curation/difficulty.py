"""How hard a problem is for a policy: the mean reward of k attempts under a judge ("reward@k").

The mean over the attempts that could be graded is an unbiased estimate of the expected reward; an
attempt that was cut in its reasoning has no proof and scores 0, which is a fact about the policy,
and one that the judge failed on is missing and asked for again, never a 0. The columns are those of
FineProofs-RL: 128 attempts of Qwen3-4B-Thinking-2507 under gpt-oss-20b there.
"""

import asyncio
import math
import pathlib
from collections.abc import Sequence

from etils import epath

from qed_jax import prompts
from qed_jax.curation import asking, chats
from qed_jax.curation.dataset import Item, Outcome, key
from qed_jax.curation.ledger import Ledger
from qed_jax.records import Problem
from qed_jax.rollout import jobs, judging
from qed_jax.rollout.experience import sampling
from qed_jax.scaffolds.proof import split_proof
from qed_jax.scaffolds.reasoning_cache import turn_seed

MAX_SCORE, SOLVED = 7, 6
PASS_AT = (1, 4, 16, 64)


def estimates(scores: Sequence[int]) -> dict:
  """The columns of a problem from the scores (0..7) of its attempts, at least one.

  reward_std is the square root of the unbiased variance, None for a single attempt. pass@j is the
  unbiased 1 - C(n - c, j) / C(n, j) with c attempts of n that score 6 or 7, for each j <= n.
  """
  n, rewards = len(scores), [score / MAX_SCORE for score in scores]
  mean = math.fsum(rewards) / n
  variance = math.fsum((r - mean) ** 2 for r in rewards) / (n - 1) if n > 1 else None
  solved = sum(score >= SOLVED for score in scores)
  passes = {f"pass@{j}": pass_at(n, solved, j) for j in PASS_AT}
  return {
    "scores": list(scores),
    "rewards": rewards,
    "num_rewards": n,
    "reward_mean": mean,
    "reward_std": None if variance is None else math.sqrt(variance),
  } | passes


def pass_at(n: int, solved: int, j: int) -> float | None:
  """Unbiased probability that one of j attempts solves it, from `solved` of n; None for j > n."""
  return None if j > n else 1 - math.comb(n - solved, j) / math.comb(n, j)


async def run(config, root: pathlib.Path, items: list[Item]) -> Outcome:
  """All rows with at least one grade, with the columns of `estimates`."""
  template = prompts.load(config.prompt)
  different = {_key(item.problem): item.problem for item in items}
  wanted = {
    f"{name}/{i}": (problem, i)
    for name, problem in different.items()
    for i in range(config.samples_per_problem)
  }
  chat = chats.open_chat(config, root)
  grade = jobs.grader(config.judge, epath.Path(root))
  judging.check(grade)
  kept, dropped = [], []
  try:
    with Ledger(root / "attempts.jsonl") as attempts, Ledger(root / "grades.jsonl") as grades:

      async def attempt(pair: tuple[Problem, int]) -> dict:
        problem, i = pair
        content = prompts.render(template, problem=problem.statement, summary="")
        [completion] = await chat(
          [{"role": "user", "content": content}],
          n=1,
          seed=turn_seed(config.seed, problem.id, i),
          **sampling(config.rollout),
        )
        return {
          "proof": split_proof(completion.text)[1],
          "finish_reason": completion.finish_reason,
          "output_tokens": completion.usage.output_tokens,
        }

      async def ask(pair: tuple[Problem, int]) -> dict:
        problem, i = pair
        name = f"{_key(problem)}/{i}"
        if name not in attempts:  # what was sampled is kept even if the judge then fails
          await asyncio.to_thread(attempts.add, name, await attempt(pair))
        sampled = attempts[name]
        mark = await grade(problem, sampled["proof"])
        if mark.score is None:
          raise asking.Unusable(f"no grade: {mark.reason}")
        cut = sampled["finish_reason"] != "stop"
        return {"score": mark.score, "cut": cut, "tokens": sampled["output_tokens"]}

      missing = await asking.fill(
        grades,
        wanted,
        ask,
        concurrency=config.concurrency,
        max_failures=config.max_failures,
        label="attempts",
      )
      columns, cut = {}, 0
      for name in different:
        records = [
          grades[f"{name}/{i}"]
          for i in range(config.samples_per_problem)
          if f"{name}/{i}" in grades
        ]
        cut += sum(record["cut"] for record in records)
        if records:
          columns[name] = estimates([record["score"] for record in records])
  finally:
    await chats.close(chat)
  for item in items:
    found = columns.get(_key(item.problem))
    if found:
      kept.append(item.row | found)
    else:
      dropped.append({"why": "no attempt could be graded"} | item.row)
  judge = config.judge.reward if config.judge.reward != "rubric" else config.judge.model
  details = {"policy": chats.told(config), "judge": judge, "prompt": config.prompt}
  details |= {"sampling": sampling(config.rollout), "attempts": config.samples_per_problem}
  details["attempts that were cut"] = cut
  return Outcome(kept, dropped, missing, len(wanted), details)


def _key(problem: Problem) -> str:
  return key(problem.statement, problem.rubric, problem.solution, problem.answer)
