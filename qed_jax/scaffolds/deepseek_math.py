"""DeepSeek-Math-V2: a pool of proofs, each verified several times, refined by what was found.

Source: arXiv 2511.22570 and its released run.sh (128 proofs, 64 verifications, 16 rounds of 32 x 4
refinements); QED-Nano's eval agents/deepseek_math.py (4 proofs, 4 verifications, 2 iterations of
4 refinements by the 2 lowest analyses); the reasoning cache's paper makes the pool with the cache.

Calls: pool_size proofs and as many x verifications, then in each iteration best x refinements
proofs, each verified the same way: at most 60 with QED-Nano's numbers. A proof's verifications do
not wait for the other proofs. The search stops before an iteration once a proof has passed: all its
readable scores are 1, and more than half can be read.

Failure. A generation or refinement without a proof is dropped. A verification that fails or cannot
be read is no score at all (in QED-Nano it was 0). A proof without any score ranks just above a
refuted one, and is refined without a report. With meta_verifications, an analysis that found fault
counts only if more than half of its readable meta-verifications uphold it, or none can be read; so
the paper labels proofs, while its search, like the released script, does without
(meta_verifications = 0).

Other departures: equal means are ranked by the score that the author gave itself, as in the
released script, then by age; the facts of QED-Nano's agent leave open whether its two analyses
made one refinement or two: one, as its count of calls says (refinements x analyses).
"""

import dataclasses
import statistics

from qed_jax.prompts import render
from qed_jax.records import Problem, Solution
from qed_jax.scaffolds.calls import Calls, answer_of, together, turn_seed, user
from qed_jax.scaffolds.verdicts import quote, split_evaluation, verdict

SCORES = "0", "0.5", "1"
FIELDS = {
  "verify_template": {"problem", "proof"},
  "meta_template": {"problem", "proof", "report"},
  "refine_template": {"problem", "proof", "reports"},
}


@dataclasses.dataclass(frozen=True)
class Review:
  """An analysis and its score, None where it has none that counts."""

  report: str
  score: float | None


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A proof in the pool. name: (number,) and, for every refinement, its iteration and number."""

  name: tuple
  proof: str
  own_score: float | None
  reviews: tuple[Review, ...]

  @property
  def scores(self) -> list[float]:
    return [review.score for review in self.reviews if review.score is not None]

  @property
  def passed(self) -> bool:
    return 2 * len(self.scores) > len(self.reviews) and min(self.scores) == 1

  @property
  def rank(self) -> tuple:
    mean = statistics.fmean(self.scores) if self.scores else 0.0
    return mean, not self.scores, self.own_score or 0.0


async def solve(
  problem: Problem,
  chat,
  *,
  generate,
  pool_size: int,
  verifications: int,
  meta_verifications: int,
  iterations: int,
  best: int,
  refinements: int,
  analyses: int,
  sampling: dict,
  verify_sampling: dict,
  verify_template: str,
  meta_template: str,
  refine_template: str,
  seed: int,
) -> Solution:
  """The proof with the highest mean score.

  generate: the scaffold that makes the pool. best: how many proofs an iteration refines, each
  `refinements` times, each time by `analyses` of its analyses, the lowest scores first.
  """
  calls = Calls.of(chat)

  async def judge(stage: str, template: str, name: tuple, **texts: str):
    shown = {key: quote(text) for key, text in texts.items()}
    content = render(template, problem=problem.statement, **shown)
    completion = await calls.ask(stage, [user(content)], seed, *name, sampling=verify_sampling)
    score = verdict(completion, SCORES)
    return answer_of(completion), None if score is None else float(score)

  async def review(proof: str, name: tuple) -> Review:
    report, score = await judge("verify", verify_template, name, proof=proof)
    if score is not None and score < 1 and meta_verifications:
      votes = await together(
        judge("meta_verify", meta_template, (*name, m), proof=proof, report=report)
        for m in range(meta_verifications)
      )
      read = [vote for _, vote in votes if vote is not None]
      if read and 2 * sum(vote > 0 for vote in read) <= len(read):
        score = None
    return Review(report, score)

  async def reviewed(name: tuple, text: str) -> Candidate | None:
    proof, own_score = split_evaluation(text)
    if not proof:
      return None
    reviews = await together(review(proof, (*name, v)) for v in range(verifications))
    return Candidate(name, proof, own_score, tuple(reviews))

  async def first(number: int) -> Candidate | None:
    own = turn_seed(seed, "generate", number)
    return await reviewed((number,), await calls.proof(generate, problem, own))

  async def refined(parent: Candidate, iteration: int, number: int) -> Candidate | None:
    scored = [r for r in parent.reviews if r.score is not None]
    lowest = sorted(scored, key=lambda r: r.score)[number * analyses : (number + 1) * analyses]
    if number and not lowest:
      return None  # all its analyses are used
    reports = "\n\n".join(f"### Report {i}\n\n{r.report}" for i, r in enumerate(lowest, 1))
    values = {"proof": parent.proof, "reports": reports}
    content = render(refine_template, problem=problem.statement, **values)
    name = (*parent.name, iteration, number)
    return await reviewed(
      name, await calls.answer("refine", content, seed, *name, sampling=sampling)
    )

  pool = [c for c in await together(first(i) for i in range(pool_size)) if c]
  for iteration in range(iterations):
    if any(candidate.passed for candidate in pool):
      break
    top = sorted(pool, key=lambda c: c.rank, reverse=True)[:best]
    new = (refined(parent, iteration, r) for parent in top for r in range(refinements))
    pool += [c for c in await together(new) if c]
  return calls.solution(problem, max(pool, key=lambda c: c.rank).proof if pool else "")
