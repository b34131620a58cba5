"""Evaluation during training: every `eval.interval` steps on held-out problems, by the same code.

It has an engine of its own, made for each evaluation and let go after it, and draws nothing from
the run: the weights are bit for bit those of a run without it. Whatever goes wrong in it (no judge,
bad data, no memory) is one line and a count, eval/failures; training goes on. SIGTERM ends it
between two steps of the engine, and the run saves as ever.

Rows are in held_out/rows.jsonl with their step. An evaluation that a kill cut short is finished by
the run that resumes from its step: attempts that are done are used again.
"""

import asyncio
import json
import time
from collections.abc import Callable

import jax
from etils import epath

from qed_jax import metrics, scaffolds
from qed_jax.evaluation import attempts, sources, summary
from qed_jax.evaluation.rows import Labels, Prices, judge_name
from qed_jax.rollout import jobs
from qed_jax.rollout.engine_chat import EngineChat
from qed_jax.rollout.step_log import StepLog

FOLDER, ROWS = "held_out", "rows.jsonl"
STOP_POLL_S = 0.2  # how soon SIGTERM is seen
FREE = Prices(0.0, 0.0, 0.0, 0.0)


class Stopped(Exception):
  """The program should end: there is no result."""


class HeldOut:
  """What stays from one evaluation to the next: the problems, the judge, the file of rows.

  config: the training config, of which `eval` is read. mesh: the one that trains, which is idle
  meanwhile also where others sample. first: the step that the run resumes from. stopped: asked
  while sampling.
  """

  def __init__(
    self, config, model, mesh, tokenizer, root: epath.Path, first: int, stopped: Callable[[], bool]
  ):
    self.config, self.model, self.mesh, self.tokenizer = config, model, mesh, tokenizer
    self.root, self.first, self.stopped = root / FOLDER, first, stopped
    self.failures = 0
    self._problems = self._grade = self._log = None
    if config.eval.interval and jax.process_count() > 1:
      raise ValueError(
        f"config.eval.interval is {config.eval.interval} and this run has {jax.process_count()} "
        "hosts: evaluation in training runs on one host; set it to 0"
      )

  def due(self, step: int) -> bool:
    """Whether to evaluate after so many updates; where the run resumes, unless that is done."""
    interval = self.config.eval.interval
    if not interval or step % interval:
      return False
    return step != self.first or not self._finished(step)

  def _finished(self, step: int) -> bool:
    path = self.root / ROWS
    lines = path.read_text().split("\n") if path.exists() else ()
    return json.dumps({"step": step, "finished": True}) in lines

  def evaluate(self, step: int, params, log: StepLog) -> bool:
    """If it is due after `step` updates, a row of metrics, eval/..., of the policy `params`.

    False when the program should stop; the run that resumes then finishes this evaluation.
    """
    if not self.due(step):
      return True
    log.settle()
    began = time.perf_counter()
    measured = {}
    try:
      measured = self._evaluate(params, step)
    except Stopped:
      return False
    except Exception as error:  # whatever it is, the run is worth more than its evaluation
      self.failures += 1
      why = " ".join(str(error).split()) or type(error).__name__
      print(f"evaluation at step {step} failed, training goes on: {why[:300]}", flush=True)
    seconds = time.perf_counter() - began
    measured |= {"eval/seconds": seconds, "eval/failures": self.failures}
    log.writer.write(step, measured)
    return True

  def close(self) -> None:
    if self._log is not None:
      self._log.close()

  def _evaluate(self, params, step: int) -> dict[str, float]:
    block = self.config.eval
    if self._problems is None:
      self.root.mkdir(parents=True, exist_ok=True)
      self._grade = jobs.grader(block.judge, self.root)
      self._problems = sources.problems(block.data, block.judge, self.config.seed)
    rows = self._open(step)
    samples = block.samples_per_problem
    done = {(row["problem_id"], row["sample"]) for row in rows}
    missing = [
      (p, s) for p in self._problems for s in range(samples) if (p.id, s) not in done
    ]  # fmt: skip
    failed = self._sample(params, step, missing, rows) if missing else []
    for line in failed:
      print(f"evaluation at step {step}: {line}", flush=True)
    found = summary.summarise(
      rows,
      self._problems,
      samples,
      label=f"step {step}",
      prices=FREE,
      pass_score=block.pass_score,
      seed=self.config.seed,
    )
    self._log.write({"step": step, "finished": True})
    return named(found)

  def _open(self, step: int) -> list[dict]:
    """The rows of this step that an earlier process left, in a file open for more."""
    path, rows = self.root / ROWS, []
    if self._log is None:
      if path.exists() and step == self.first:
        rows = whole_attempts(path.read_text(), step)
      self._log = metrics.JsonLines(path, self.first)
    return rows

  def _sample(self, params, step: int, missing, rows: list[dict]) -> list[str]:
    block = self.config.eval
    engine = jobs.make_engine(self.model, self.mesh, block.rollout, self.tokenizer)
    engine.set_params(params, step)
    one = attempts.attempt(
      scaffolds.prepare(block.scaffold),
      EngineChat(engine, self.tokenizer, self.config.seed).chat,
      self._grade,
      seed=self.config.seed,
      labels=Labels(
        block.data.source, block.scaffold.name, f"step {step}", judge_name(block.judge)
      ),
      prices=FREE,
    )

    def done(new: list[dict]) -> None:
      rows.extend(new)
      for row in new:
        self._log.write({"step": step, **row})

    async def until_stopped() -> list[str]:
      work = asyncio.ensure_future(
        attempts.run(
          missing,
          one,
          done,
          at_once=block.problems_at_once,
          failures_in_a_row=block.failures_in_a_row,
        )
      )
      while not work.done():
        await asyncio.wait([work], timeout=STOP_POLL_S)
        if self.stopped() and not work.done():
          work.cancel()
          await asyncio.wait([work])
          raise Stopped
      return work.result()

    return asyncio.run(until_stopped())


def whole_attempts(text: str, step: int) -> list[dict]:
  """Rows of this step of the attempts that have all their turns; the later of two the same."""
  found: dict[tuple, dict] = {}
  for line in text.split("\n"):
    try:
      row = json.loads(line)
      if row["step"] == step:
        found[row["problem_id"], row["sample"], row["turn"]] = row
    except (ValueError, KeyError, TypeError):
      continue
  count: dict[tuple, int] = {}
  for key in found:
    count[key[:2]] = count.get(key[:2], 0) + 1
  return [row for key, row in found.items() if count[key[:2]] == row["turns"]]


def named(found: dict) -> dict[str, float]:
  """The numbers of a summary that metrics.jsonl gets."""
  names = ("score", "percent", "low", "high", "stderr", "n", "graded", "invalid", "missing")
  names += ("truncated", "tokens")
  values = {f"eval/{name}": found[name] for name in names}
  if found["turns"] > 1:
    values |= {f"eval/score_turn_{e['turn']}": e["score"] for e in found["by_turn"]}
  for entry in found["pass_at_k"][1:]:
    values[f"eval/pass@{entry['k']}"] = entry["score"]
  return {name: value for name, value in values.items() if value is not None}
