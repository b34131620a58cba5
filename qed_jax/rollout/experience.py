"""Problems -> prompts -> completions -> grades -> Batch: the stream of an RL job.

Rubric RL and cache RL differ in one function, the source of the prompts: the problem itself, or
states that the reasoning cache reached (scaffolds/reasoning_cache.py). A piece of work is a problem
with all its attempts; pieces of several steps are open at once where max_lag allows it
(streaming.py), sampling goes on under each new policy, and grading overlaps it. Everything drawn at
random is keyed by (seed, step, problem, attempt), so the state to save is the buffer of summaries
and the numbers of the open pieces.

On several hosts each samples and grades problems of its own with an engine of its own: of a step's
problems, host h has number h, h + hosts, ... The hosts meet when each has what it trains next.
"""

import asyncio
import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Awaitable, Callable, Sequence

import jax
import numpy as np

from qed_jax import hosts
from qed_jax.data.tokenizer import Tokenizer
from qed_jax.objectives import reasoning_cache
from qed_jax.records import Completion, Grade, Problem, Rollout
from qed_jax.rollout.assembly import Group, Marks, assemble, marks
from qed_jax.rollout.engine import Engine
from qed_jax.rollout.engine_chat import EngineChat
from qed_jax.rollout.judging import Judge
from qed_jax.rollout.requests import RequestError
from qed_jax.rollout.streaming import Window, share, together
from qed_jax.rollout.weights import on_this_host
from qed_jax.scaffolds.proof import split_proof
from qed_jax.scaffolds.reasoning_cache import (
  State,
  reason_messages,
  solve,
  states,
  summarise,
  turn_seed,
)

STOP_POLL_S = 0.2  # how soon SIGTERM is seen while sampling


@dataclasses.dataclass
class Work:
  """A problem and what has become of it. roll_in: tokens spent on the way to its states."""

  number: int
  problem: Problem
  start: reasoning_cache.StoredSummary = reasoning_cache.EMPTY
  groups: list[Group] = dataclasses.field(default_factory=list)
  rollouts: list[list[Rollout]] = dataclasses.field(default_factory=list)
  summaries: tuple = ()
  roll_in: int = 0
  sampled: bool = False


class Experience:
  """next(params, step) -> (Batch, metrics, rollouts); state() and restore() for checkpoints."""

  lag = 0  # sampling waits for the step's weights, so its metrics can be read at once

  def __init__(
    self,
    config,
    problems: Sequence[Problem],
    engine: Engine,
    tokenizer: Tokenizer,
    summariser,
    grade: Callable[[Problem, str], Awaitable[Grade]],
    templates: dict[str, str],
    stopped: Callable[[], bool],
  ):
    """config: the job's ConfigDict (rollout, objective, cache, batch, seed). templates: the texts
    of the prompts "reason" and "summarise". summariser: a chat, or None for the policy's own.
    stopped: asked while sampling; True makes `next` give up its step and return None."""
    rollout = config.rollout
    self.config, self.problems, self.engine = config, problems, engine
    self.summariser, self.grade, self.templates = summariser, grade, templates
    self.stopped = stopped
    self.buffer = reasoning_cache.SummaryBuffer()
    self.window = Window(
      rollout.problems // hosts.count(),
      rollout.max_lag,
      rollout.order,
      host=hosts.index(),
      hosts=hosts.count(),
    )
    self.engine_chat = EngineChat(engine, tokenizer, config.seed, hold=self._hold)
    self.chat = self.engine_chat.chat
    self._open: dict[int, Work] = {}
    self._tasks: dict[asyncio.Task, Work] = {}
    self._again: dict | None = None  # restored state, until the first step
    self._resting = False
    self._loop = asyncio.new_event_loop()
    if self.judge is not None:
      self.judge.on_change(self.engine_chat.go_on)
    self._thread = threading.Thread(target=self._loop.run_forever, name="rollouts", daemon=True)
    self._thread.start()

  def next(self, params, step: int):
    """A step's experience; sampling goes on with the policy `params`, whose version is `step`.

    Returns this host's rows of the Batch (numpy), metrics of all hosts (floats) and this host's
    rollouts, graded or not; None when the program should stop on any host. With placement
    "colocated" the engine rests when this returns.
    """
    begin, before = time.perf_counter(), self._sampled_tokens()
    if params is not None:
      params = on_this_host(self.engine.config, params)
    updated = due = mine = None
    if self._wait(self.engine_chat.set_params(params, step)) is not None:
      updated = time.perf_counter()
      due = self._wait(self._until_due(step))
    if due is not None:
      (due,) = due
      done = [self._open[number] for number in due]
      rollouts_PA = [group for work in done for group in work.rollouts]
      mine = dataclasses.asdict(marks(rollouts_PA, step)) | {
        "roll_in": sum(work.roll_in for work in done),
        "open": len(self._open) - len(due),
        "sampled": self._sampled_tokens() - before,
      }
    # Here the hosts meet. An engine whose order is that of arrival goes on until all are here.
    everyone = hosts.gather(mine, waiting=self.stopped)
    if None in everyone:
      if due is not None:
        self._wait(self._cancel(), stoppable=False)
      return None
    seconds = time.perf_counter() - begin
    self._wait(self._taken(due), stoppable=False)
    roll_in, still_open, sampled = (
      sum(one.pop(name) for one in everyone) for name in ("roll_in", "open", "sampled")
    )
    if not any(one["score"] for one in everyone):
      raise ValueError(f"step {step}: every prompt is longer than rollout.max_length: raise it")
    trains_summaries = self.config.job == "cache_rl" and self.config.cache.summaries > 1
    written = [group for work in done for group in work.groups] if trains_summaries else []
    everyones_marks = [Marks(**one) for one in everyone]
    batch, metrics = assemble(self.config, rollouts_PA, written, step, everyones_marks)
    if self.config.job == "cache_rl" and self.config.cache.replay:
      self._remember(done, step)
    if self.judge is not None:
      metrics |= self.judge.metrics()
    metrics |= {
      "roll_in_tokens": roll_in,
      "open_problems": still_open,
      "seconds/rollout": seconds,
      "seconds/set_params": updated - begin,
      "tokens_per_s/rollout": sampled / seconds,
    }
    return batch, metrics, [r for group in rollouts_PA for r in group]

  def _remember(self, done: list[Work], step: int) -> None:
    """Puts the summaries of the step, of all hosts, into the buffer that all of them hold."""
    written = {str(w.number): reasoning_cache.continued(w.start, w.summaries, step) for w in done}
    texts = reasoning_cache.to_json(reasoning_cache.SummaryBuffer(written))
    merged: dict[str, list] = {}
    for theirs in hosts.gather(texts):
      merged |= theirs
    by_number = reasoning_cache.from_json(merged).summaries
    self.buffer = reasoning_cache.replace(self.buffer, {
      self.problem(int(number)).id: by_number[number] for number in sorted(by_number, key=int)
    })  # fmt: skip

  def close(self) -> None:
    """Gives up what is open and ends the thread."""
    if self._thread.is_alive():
      self._wait(self._cancel(), stoppable=False)
      if self.judge is not None:
        self._wait(self.judge.close(), stoppable=False)
      self._loop.call_soon_threadsafe(self._loop.stop)
      self._thread.join()
      self._loop.close()

  def state(self) -> dict:
    """The same for any number of hosts, which all call it."""
    window = together(hosts.gather(self._again or self.window.state()))
    return {"buffer": reasoning_cache.to_json(self.buffer), "window": window}

  def restore(self, state: dict) -> None:
    """What was open is begun again, under the policy that the run resumes with."""
    self.buffer = reasoning_cache.from_json(state["buffer"])
    self._again = share(state["window"], hosts.index(), hosts.count())

  # --- the event loop ------------------------------------------------------------------------

  def _wait(self, work, stoppable: bool = True):
    """A coroutine's result in a tuple; None, and all that is open cancelled, once `stopped`."""
    future = asyncio.run_coroutine_threadsafe(work, self._loop)
    while True:
      try:
        return (future.result(timeout=STOP_POLL_S),)
      except concurrent.futures.TimeoutError:
        if future.done():
          raise
        if stoppable and self.stopped():
          future.cancel()
          self._wait(self._cancel(), stoppable=False)
          return None

  async def _cancel(self) -> None:
    tasks = list(self._tasks)
    for task in tasks:
      task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    self._tasks.clear()
    self._resting = True
    await self.engine_chat.rest()

  def _hold(self) -> bool:
    """Whether the engine rests. In the order of admission it does so as soon as the next step is
    sampled, not when a judge is done with it: how far later work gets must not depend on a clock.
    While a judge's endpoint is down nothing is sampled that it would have to grade.
    """
    if self._resting or (self.judge is not None and self.judge.paused):
      return True
    rollout = self.config.rollout
    if rollout.order == "admission" and rollout.placement == "colocated":
      return all(self._open[n].sampled for n in self.window.needed() if n in self._open)
    return False

  async def _until_due(self, step: int) -> list[int]:
    """Starts what may start, and waits for what this step trains -> its numbers, still open."""
    if self._again is not None:
      for number in self.window.restore(self._again, step):
        self._start(number)
      self._again = None
    for number in self.window.admit(step):
      self._start(number)
    self._resting = False
    self.engine_chat.go_on()
    while (due := self.window.due(step)) is None:
      finished, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
      for task in sorted(finished, key=lambda task: self._tasks[task].number):
        task.result()
        self.window.finish(self._tasks.pop(task).number)
    return due

  async def _taken(self, due: list[int]) -> None:
    """These are trained; with placement "colocated" the engine rests until the next step."""
    self.window.take(due)
    for number in due:
      del self._open[number]
    if self.config.rollout.placement == "colocated":
      self._resting = True
      await self.engine_chat.rest()

  def _start(self, number: int) -> None:
    work = Work(number, self.problem(number))
    self._open[number] = work
    self._tasks[self._loop.create_task(self._run(work))] = work

  def _sampled_tokens(self) -> int:
    return self.engine.counters.sampled_tokens

  @property
  def judge(self) -> Judge | None:
    """Who grades, if that is a model."""
    return self.grade if isinstance(self.grade, Judge) else None

  # --- prompts -------------------------------------------------------------------------------

  def problem(self, number: int) -> Problem:
    """The problem of a piece of work: every one once an epoch, shuffled anew."""
    epoch, place = divmod(number, len(self.problems))
    order = np.random.default_rng((self.config.seed, epoch)).permutation(len(self.problems))
    return self.problems[int(order[place])]

  async def _run(self, work: Work) -> None:
    """From the problem to graded attempts."""
    step, place = divmod(work.number, self.config.rollout.problems)
    seed = turn_seed(self.config.seed, step, work.problem.id)
    if self.config.job == "rl":
      work.groups = [Group(State(work.problem, "", 1), f"{work.problem.id}/{place}", seed)]
    else:
      try:
        await self._roll_in(work, step, place, seed)
      except RequestError:  # a prompt too long for the engine: nothing to train on, nothing lost
        work.sampled = True
        return
    sampled = 0

    def one_sampled():
      nonlocal sampled
      sampled += 1
      work.sampled = sampled == len(work.groups)

    attempts = [self._attempt(group, one_sampled) for group in work.groups]
    work.rollouts = await asyncio.gather(*attempts)

  async def _roll_in(self, work: Work, step: int, place: int, seed: int) -> None:
    """Rolls the problem in for `cache.turns` turns, draws `cache.states` of the states passed."""
    cache, problem = self.config.cache, work.problem
    if cache.replay:
      work.start = reasoning_cache.sample(
        self.buffer, problem.id, seed=self.config.seed, step=step, draw=place
      )
    solution = await solve(
      problem,
      self.chat,
      turns=cache.turns,
      reason_template=self.templates["reason"],
      summarise_template=self.templates["summarise"],
      reason=sampling(self.config.rollout),
      summarise_sampling=sampling(cache),
      seed=turn_seed(seed, "roll-in"),
      summariser=self.summariser,
      summary=work.start.text,
      summarise_last=cache.final_state,
    )
    work.summaries = tuple(t.summary_after for t in solution.turns if t.summary_completion)
    spent = (c for t in solution.turns for c in (t.completion, t.summary_completion) if c)
    work.roll_in = sum(len(c.tokens) for c in spent)
    passed = states(solution)
    for state, chosen in zip(passed, self._chosen(problem, step, place, len(passed)), strict=True):
      if chosen:
        name = f"{reasoning_cache.group(problem.id, state.turn, state.summary)}/{place}"
        own = turn_seed(seed, "attempts", state.turn)
        work.groups.append(Group(state, name, own, sibling=name))
        if cache.summaries > 1 and state.turn > 1:
          work.groups += await self._siblings(solution, work.groups[-1])

  def _chosen(self, problem: Problem, step: int, place: int, passed: int) -> list[bool]:
    number = np.array([reasoning_cache.problem_number(problem.id, place)], np.uint32)
    words = np.uint32(self.config.seed), np.uint32(step), number, np.ones((1, passed), bool)
    chosen_PU = _choose(*jax.device_put(words), self.config.cache.states)
    return jax.device_get(chosen_PU)[0].tolist()

  async def _siblings(self, solution, group: Group) -> list[Group]:
    """More summaries of the same trace, to compare with the one that the roll-in went on with."""
    turn = solution.turns[group.state.turn - 2]
    reasoning = split_proof(turn.completion.text)[0]
    made = []
    for m in range(1, self.config.cache.summaries):
      written = await summarise(
        solution.problem,
        turn.summary_before,
        reasoning,
        self.chat,
        template=self.templates["summarise"],
        seed=turn_seed(group.seed, "sibling", m),
        sampling=sampling(self.config.cache),
      )
      state = dataclasses.replace(group.state, summary=written.text.strip(), writer=written)
      seed = turn_seed(group.seed, "attempts", m)
      made.append(Group(state, f"{group.name}/{m}", seed, sibling=group.name))
    return made

  # --- attempts ------------------------------------------------------------------------------

  async def _attempt(self, group: Group, sampled: Callable[[], None]) -> list[Rollout]:
    """Graded attempts at one state; calls sampled() when only their grades are missing."""
    problem, count = group.state.problem, self.config.rollout.attempts
    messages = reason_messages(self.templates["reason"], problem, group.state.summary)
    try:
      completions = await self.chat(
        messages, n=count, seed=group.seed, **sampling(self.config.rollout)
      )
    except RequestError as error:  # a prompt too long for the engine: no grade, and not a zero
      sampled()
      nothing = Completion(text="", finish_reason="length")
      lost = Grade(None, f"not sampled: {error}")
      return [rollout_of(group, messages, nothing, lost, i) for i in range(count)]
    grading_samples = self.judge is not None and self.judge.in_engine
    if not grading_samples:
      sampled()
    grades = await asyncio.gather(
      *(self.grade(problem, split_proof(c.text)[1]) for c in completions)
    )
    if grading_samples:  # the engine must not rest before
      sampled()
    return [
      rollout_of(group, messages, completion, grade, i)
      for i, (completion, grade) in enumerate(zip(completions, grades, strict=True))
    ]


_choose = jax.jit(reasoning_cache.choose_states, static_argnums=4)


def rollout_of(group: Group, messages, completion: Completion, grade: Grade, attempt: int):
  """An attempt at a group's state."""
  state = group.state
  return Rollout(
    problem=state.problem,
    messages=tuple(messages),
    completion=completion,
    grade=grade,
    group=group.name,
    attempt=attempt,
    turn=state.turn,
    summary=state.summary,
  )


def sampling(block) -> dict:
  """The sampling fields of a config block, as the arguments of a chat."""
  return {
    "max_tokens": block.max_tokens,
    "temperature": block.temperature,
    "top_p": block.top_p,
    "top_k": block.top_k,
  }
