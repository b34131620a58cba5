"""Who grades a run's proofs, and what is known of how well: grader(config.judge, root).

A Judge asks a language model, over HTTP or an engine in this process, and watches it: proofs of
known score are slipped in among the others, some conversations are kept to be read, and what it
costs and how it answers are metrics of the step. It stops the run, in one line, when it does not
read what it is shown; while its endpoint is down it is `paused`, and sampling waits with it.
"""

import asyncio
import collections
import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from qed_jax import hosts, prompts
from qed_jax.chat import ChatError, Endpoint, HttpChat, Unavailable
from qed_jax.records import Completion, Grade, GradedProof, Problem
from qed_jax.rewards import answer, canaries, exact, precheck, rubric
from qed_jax.rollout.requests import RequestError

COMPARISON_S = 10.0  # for one final answer against another
TOP = 7
SAME = 200  # top marks in a row that are worth a word


def grader(judge, root: epath.Path, chat=None):
  """async (problem, proof) -> Grade, by the kind that config.judge.reward names.

  chat: of the engine that config.judge.engine asks for. Raises ValueError, one line, for a config
  that cannot work and when the judge's environment variables are not set.
  """
  if judge.reward == "answer":
    return functools.partial(answer.grade, checker=answer.Checker(COMPARISON_S))
  if judge.reward == "rubric":
    return Judge(judge, root, chat)

  async def grade(problem, proof):
    return exact.grade(problem, proof)

  return grade


def check(grade) -> None:
  """Asks a judge over HTTP, about a few proofs of known score, before anything is spent on a run;
  other graders are left alone. Raises Unavailable when it cannot be asked or does not grade."""
  if isinstance(grade, Judge):
    asyncio.run(grade.check())


class Judge:
  """await judge(problem, proof) -> Grade. Counts what happens until `metrics` is asked.

  Raises Unavailable, one line, when the run should stop: the endpoint refuses or is down for longer
  than the patience, a budget is spent, or the canaries say that it does not grade.
  """

  def __init__(self, judge, root: epath.Path, chat=None):
    if judge.style not in rubric.STYLES:
      raise ValueError(
        f"config.judge.style is {judge.style!r}: choose one of {', '.join(rubric.STYLES)}"
      )
    if judge.samples < 1:
      raise ValueError(f"config.judge.samples is {judge.samples}: give 1 or more")
    for name in ("canary_share", "audit_share"):
      if not 0 <= judge[name] <= 1:
        raise ValueError(f"config.judge.{name} is {judge[name]}: give a share from 0 to 1")
    if judge.engine and chat is None:
      raise ValueError(
        f"config.judge.engine is {judge.engine!r}, but this program has no engine for it: leave it "
        "empty to ask an endpoint"
      )
    self.config = judge
    self.style = rubric.STYLES[judge.style]
    self.template = prompts.load(judge.template or self.style.template)
    self.canaries = canaries.load(judge.canaries) if judge.canary_share else []
    self.in_engine = bool(judge.engine)
    self._http = None if judge.engine else endpoint_chat(judge, root)
    self._chat = chat if judge.engine else self._http
    self._audit = root / of_this_host(judge.audit) if judge.audit_share and judge.audit else None
    self._errors: collections.deque[int] = collections.deque(maxlen=judge.canary_window)
    self._said: collections.deque[int] = collections.deque(maxlen=judge.canary_window)
    self._in_a_row = 0
    self._counts: collections.Counter[str] = collections.Counter()
    self._latencies: list[float] = []
    self._before: dict[str, float] = {}

  # --- grading ---------------------------------------------------------------------------------

  async def __call__(self, problem: Problem, proof: str) -> Grade:
    """The grade of a proof."""
    config = self.config
    if config.style != "parity":
      limits = {"min_chars": config.min_chars, "max_chars": config.max_chars}
      if (known := precheck.verdict(problem, proof, **limits)) is not None:
        self._counts["prechecked"] += 1
        return known
    draw = _draw(problem, proof)
    tasks = [self._grade(problem, proof, "graded", 0, draw)]
    if self.canaries and draw < config.canary_share:
      number = int(draw / config.canary_share * 2**24)  # of the canary, and of its samples
      tasks.append(self._send_canary(self.canaries[number % len(self.canaries)], number + 1))
    grade = (await asyncio.gather(*tasks))[0]
    self._watch(grade)
    return grade

  async def check(self) -> None:
    """See the function `check`."""
    if self._http is None:
      return
    await self._http.check()
    if not self.canaries:
      return
    one_of_each = {c.score: c for c in self.canaries}.values()
    chosen = [*one_of_each, *(c for c in self.canaries if c not in one_of_each)][:4]
    grades = await asyncio.gather(*(self._send_canary(c, 0) for c in chosen))
    said = [grade.score for grade in grades]
    if all(score is None for score in said):
      raise Unavailable(self._unread(grades[0]))
    known = [score for score in said if score is not None]
    if len(known) > 1 and len(set(known)) == 1 and len({c.score for c in chosen}) > 1:
      raise Unavailable(self._deaf(known[0], len(known)))

  async def close(self) -> None:
    """Closes the connections and the reply cache."""
    if self._http is not None:
      await self._http.close()

  async def _grade(self, problem, proof, kind: str, first: int, draw: float) -> Grade:
    config, conversation = self.config, []

    async def ask(messages, **sampling):
      completion = await self._ask(messages, **sampling)
      conversation.append({"messages": messages, "reply": completion.text})
      return [completion]

    grade = await rubric.grade(
      problem,
      proof,
      ask,
      template=self.template,
      style=self.style,
      attempts=config.samples,
      votes=config.votes,
      aggregate=config.aggregate,
      on_invalid=config.on_invalid,
      first=first * config.votes * config.samples,
      max_tokens=config.max_tokens,
      temperature=config.temperature,
    )
    self._counts["proofs"] += 1
    self._counts["none"] += grade.score is None
    self._counts["sanitised"] += rubric.sanitise(proof) != proof
    if len(grade.votes) > 1:
      self._counts["voted"] += 1
      self._counts["disagreement"] += max(grade.votes) - min(grade.votes)
    # Another digit of the draw than the canaries look at, or both would pick the same proofs.
    if self._audit is not None and conversation:
      if kind == "canary" or draw * 2**20 % 1 < config.audit_share:
        self._keep(kind, problem, proof, grade, conversation)
    return grade

  async def _ask(self, messages, **sampling) -> Completion:
    self._counts["calls"] += 1
    try:
      [completion] = await self._chat(messages, **sampling)
    except RequestError as error:  # the engine's: too long a prompt for it
      self._counts["failed"] += 1
      raise ChatError(str(error)) from None
    except ChatError:
      self._counts["failed"] += 1
      raise
    usage = completion.usage
    if usage.calls:
      self._latencies.append(usage.seconds)
      self._counts["input_tokens"] += usage.input_tokens
      self._counts["output_tokens"] += usage.output_tokens
    cut = completion.finish_reason != "stop" and not self.style.reads_cut
    unread = cut or self.style.parse(completion.text, self.style.scale) is None
    self._counts["replies"] += 1
    self._counts["invalid"] += unread
    return completion

  # --- watching --------------------------------------------------------------------------------

  async def _send_canary(self, canary: GradedProof, first: int) -> Grade:
    """Grades a proof of known score. Raises Unavailable when the last ones were too far off."""
    draw = _draw(canary.problem, canary.proof)
    grade = await self._grade(canary.problem, canary.proof, "canary", first, draw)
    if grade.score is None:
      return grade
    error = abs(grade.score - canary.score)
    self._counts["canaries"] += 1
    self._counts["canary_error"] += error
    self._counts["canary_bias"] += grade.score - canary.score
    self._errors.append(error)
    self._said.append(grade.score)
    full = len(self._errors) == self._errors.maxlen
    if full and (mean := sum(self._errors) / len(self._errors)) > self.config.max_canary_error:
      if len(set(self._said)) == 1:
        raise Unavailable(self._deaf(grade.score, len(self._said)))
      raise Unavailable(
        f"{self._name}: off by {mean:.1f} points of 7 on the last {len(self._errors)} proofs of "
        f"known score: read the canaries in {self._audit}, then take another judge, or raise "
        "config.judge.max_canary_error, and run the same command to go on"
      )
    return grade

  def _watch(self, grade: Grade) -> None:
    """A word on stderr when a judge seems to know top marks only."""
    if grade.score is not None:
      self._in_a_row = self._in_a_row + 1 if grade.score == TOP else 0
    if self._in_a_row == SAME:
      print(
        f"warning: {self._name} gave {TOP} to {SAME} proofs in a row: read {self._audit}, and set "
        "config.judge.canary_share above 0 to have it watched",
        file=sys.stderr,
        flush=True,
      )

  def _deaf(self, score: int, number: int) -> str:
    return (
      f"{self._name}: it gave {score} to all of {number} proofs of known and different scores, so "
      "it does not grade: set config.judge.model to a stronger model, or mend config.judge.template"
    )

  def _unread(self, grade: Grade) -> str:
    last = " ".join(grade.feedback.split())[-120:]
    return (
      f"{self._name}: no reply to proofs of known score could be read ({grade.reason}; the last "
      f"ends with {last!r}): it must end with <score>N</score>, N one of "
      f"{', '.join(map(str, self.style.scale))}; see config.judge.style, template and max_tokens"
    )

  @property
  def _name(self) -> str:
    return f"judge {self.config.engine or self.config.model}"

  def _keep(self, kind: str, problem: Problem, proof: str, grade: Grade, conversation) -> None:
    row = {
      "kind": kind,
      "problem_id": problem.id,
      "score": grade.score,
      "reason": grade.reason,
      "votes": list(grade.votes),
      "proof": proof,
      "conversation": conversation,
    }
    data = json.dumps(row).encode() + b"\n"
    where = self._audit.name if "://" in str(self._audit) else str(self._audit)  # none can append
    os.makedirs(os.path.dirname(os.path.abspath(where)), exist_ok=True)
    with open(where, "ab+") as file:
      if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
        data = b"\n" + data  # a kill tore the last line
      file.write(data)

  # --- what the run sees -----------------------------------------------------------------------

  @property
  def paused(self) -> bool:
    """Whether the endpoint is down: no work should begin that would have to be graded."""
    return self._http is not None and self._http.breaker.open

  def on_change(self, changed: Callable[[], None]) -> None:
    """`changed` is called when `paused` has changed."""
    if self._http is not None:
      self._http.breaker.changed = changed

  def metrics(self) -> dict[str, float]:
    """What has happened since this was last asked. A mean over nothing is left out."""
    counts, self._counts = self._counts, collections.Counter()
    latencies, self._latencies = self._latencies, []
    found = {name: float(counts[name]) for name in ("calls", "failed")}
    found |= {name: float(counts[name]) for name in ("input_tokens", "output_tokens")}
    found |= self._since_last()
    shares = [
      ("invalid_share", "invalid", "replies"),
      ("none_share", "none", "proofs"),
      ("sanitised_share", "sanitised", "proofs"),
      ("disagreement", "disagreement", "voted"),
      ("canary_error", "canary_error", "canaries"),
      ("canary_bias", "canary_bias", "canaries"),
    ]
    found |= {name: counts[a] / counts[b] for name, a, b in shares if counts[b]}
    read = counts["prechecked"] + counts["proofs"] - counts["canaries"]
    if read:
      found["precheck_share"] = counts["prechecked"] / read
    if latencies:
      p50, p95 = np.percentile(latencies, [50, 95])
      found |= {"latency_p50_s": float(p50), "latency_p95_s": float(p95)}
    return {f"judge/{name}": value for name, value in found.items()}

  def _since_last(self) -> dict[str, float]:
    if self._http is None:
      return {}
    http = self._http
    now = {name: float(http.stats[name]) for name in ("requests", "retries", "cache_hits")}
    now |= {"dollars": http.cost, "paused_s": http.breaker.seconds}
    before, self._before = self._before, now
    return {name: value - before.get(name, 0.0) for name, value in now.items()}


def endpoint_chat(judge, root: epath.Path) -> HttpChat:
  """The chat of a judge over HTTP. Raises ValueError when its environment is not set."""
  base_url = os.environ.get(judge.base_url_env)
  if not base_url:
    raise ValueError(
      f"the judge needs an endpoint: set {judge.base_url_env} (and {judge.api_key_env}), "
      "for example to a `python -m qed_jax.serve` or vLLM server"
    )
  effort: dict[str, Any] = {"reasoning_effort": judge.reasoning_effort}
  if judge.api == "responses":
    effort = {"reasoning": {"effort": judge.reasoning_effort}}
  return HttpChat(
    Endpoint(
      base_url=base_url,
      model=judge.model,
      api=judge.api,
      key_env=judge.api_key_env,
      key_required=False,
      hides_thinking=True,
      extra_body=effort if judge.reasoning_effort else {},
    ),
    concurrency=judge.concurrency,
    timeout=judge.timeout_s,
    deadline=judge.deadline_s,
    attempts=judge.retries,
    token_budget=judge.token_budget,
    prices=(judge.price_read, judge.price_written),
    money_budget=judge.money_budget,
    patience=judge.patience_s,
    outage_after=judge.outage_after,
    cache=replies_of_this_host(judge.cache, root),
  )


def replies_of_this_host(name: str, root: epath.Path) -> str:
  """Where the judge's replies are kept, "" for nowhere: two hosts cannot append to one file."""
  return str(root / of_this_host(name)) if name and "://" not in str(root) else of_this_host(name)


def of_this_host(name: str) -> str:
  """judge.jsonl, and on another host than the first judge.host1.jsonl."""
  if not name or not hosts.index():
    return name
  path = Path(name)
  return str(path.with_name(f"{path.stem}.host{hosts.index()}{path.suffix}"))


def _draw(problem: Problem, proof: str) -> float:
  """A number in [0, 1) that the proof has, whenever and wherever it is graded."""
  seen = f"{problem.statement}\0{proof}".encode("utf-8", "replace")
  return int.from_bytes(hashlib.sha256(seen).digest()[:6], "big") / 2**48
