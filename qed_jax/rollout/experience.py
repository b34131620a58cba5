"""Problems -> prompts -> completions -> grades -> advantages -> Batch: the stream of an RL job.

Rubric RL and cache RL differ in one function, the source of the prompts: the problem itself, or
states that the reasoning cache reached (scaffolds/reasoning_cache.py). Everything drawn at random
is keyed by (seed, step, problem, attempt), so the only state to save is the buffer of summaries.
"""

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable, Sequence

import jax
import numpy as np

from qed_jax.data import packing
from qed_jax.data.tokenizer import Tokenizer
from qed_jax.objectives import finalise, reasoning_cache, rubric_rl
from qed_jax.records import Batch, Completion, Grade, Problem, Rollout
from qed_jax.rollout.engine import Engine, EngineChat, RequestError
from qed_jax.scaffolds.proof import split_proof
from qed_jax.scaffolds.reasoning_cache import (
  State,
  reason_messages,
  solve,
  states,
  summarise,
  turn_seed,
)

MAX_SCORE = 7
STOP_POLL_S = 0.2  # how soon SIGTERM is seen while sampling


@dataclasses.dataclass(frozen=True)
class Group:
  """A state to make attempts from, and the completion that wrote its summary, if it is trained."""

  state: State
  name: str
  seed: int
  sibling: str = ""  # states of one sibling name differ only in who wrote the summary


class Experience:
  """next(params, step) -> (Batch, metrics, rollouts); state() and restore() hold the buffer."""

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
    of
    the prompts "reason" and "summarise". summariser: a chat, or None for the policy's own.
    stopped: asked while sampling; True makes `next` give up its step and return None."""
    self.config, self.problems, self.engine = config, problems, engine
    self.chat = EngineChat(engine, tokenizer, config.seed).chat
    self.summariser, self.grade, self.templates = summariser, grade, templates
    self.stopped = stopped
    self.buffer = reasoning_cache.SummaryBuffer()

  def next(self, params, step: int):
    """A step's experience with the policy `params`, whose version is `step`.

    Returns a host Batch (numpy), metrics (floats) and the rollouts, graded or not; None when the
    program should stop.
    """
    start = time.perf_counter()
    self.engine.set_params(params, step)
    collected = asyncio.run(unless(self.stopped, self._collect(step)))
    if collected is None:
      return None
    rollouts_PA, written, roll_in, self.buffer = collected
    seconds = time.perf_counter() - start
    batch, metrics = self._batch(rollouts_PA, written)
    rollouts = [r for group in rollouts_PA for r in group]
    metrics.update(length_metrics(rollouts))
    sampled = roll_in + sum(len(r.completion.tokens) for r in rollouts)
    metrics.update({
      "lag_max": max(step - int(r.completion.versions.min(initial=step)) for r in rollouts),
      "roll_in_tokens": roll_in,
      "seconds/rollout": seconds,
      "tokens_per_s/rollout": sampled / seconds,
    })  # fmt: skip
    return batch, metrics, rollouts

  def close(self) -> None:
    """Nothing is held between steps."""

  def state(self) -> dict:
    return {"buffer": reasoning_cache.to_json(self.buffer)}

  def restore(self, state: dict) -> None:
    self.buffer = reasoning_cache.from_json(state["buffer"])

  # --- prompts -------------------------------------------------------------------------------

  def problems_of(self, step: int) -> list[Problem]:
    """This host's share of the step's problems: every problem once an epoch, shuffled anew."""
    wanted, size = self.config.rollout.problems, len(self.problems)
    mine = range(jax.process_index(), wanted, jax.process_count())
    picked = []
    for index in (step * wanted + i for i in mine):
      order = np.random.default_rng((self.config.seed, index // size)).permutation(size)
      picked.append(self.problems[int(order[index % size])])
    return picked

  async def _groups(self, step: int):
    """The step's groups, the tokens spent on the way, and the buffer once the step is done."""
    problems = self.problems_of(step)
    seeds = [turn_seed(self.config.seed, step, p.id) for p in problems]
    if self.config.job == "rl":
      pairs = zip(problems, seeds, strict=True)
      groups = [Group(State(p, "", 1), f"{p.id}/{i}", s) for i, (p, s) in enumerate(pairs)]
      return groups, 0, self.buffer
    return await self._cache_groups(step, problems, seeds)

  async def _cache_groups(self, step, problems, seeds):
    """Roll every problem in for `cache.turns` turns, draw `cache.states` of the states passed."""
    cache, seed = self.config.cache, self.config.seed
    starts = [
      reasoning_cache.sample(self.buffer, p.id, seed=seed, step=step, draw=i)
      if cache.replay
      else reasoning_cache.EMPTY
      for i, p in enumerate(problems)
    ]
    solutions = await gather_served(
      solve(
        problem,
        self.chat,
        turns=cache.turns,
        reason_template=self.templates["reason"],
        summarise_template=self.templates["summarise"],
        reason=sampling(self.config.rollout),
        summarise_sampling=sampling(cache),
        seed=turn_seed(roll_seed, "roll-in"),
        summariser=self.summariser,
        summary=start.text,
        summarise_last=cache.final_state,
      )
      for problem, roll_seed, start in zip(problems, seeds, starts, strict=True)
    )
    served = [i for i, solution in enumerate(solutions) if solution is not None]
    problems, seeds, starts, solutions = (
      [values[i] for i in served] for values in (problems, seeds, starts, solutions)
    )
    if not solutions:
      raise ValueError(f"step {step}: every prompt is longer than rollout.max_length: raise it")
    buffer = self.buffer
    if cache.replay:
      buffer = reasoning_cache.replace(buffer, {
        s.problem.id: reasoning_cache.continued(
          start, [t.summary_after for t in s.turns if t.summary_completion], step)
        for s, start in zip(solutions, starts, strict=True)
      })  # fmt: skip
    reached = [states(s) for s in solutions]
    numbers = [reasoning_cache.problem_number(p.id, i) for i, p in enumerate(problems)]
    available_PU = np.ones((len(problems), len(reached[0])), bool)
    chosen_PU = jax.device_get(
      _choose(*jax.device_put((np.uint32(seed), np.uint32(step), np.array(numbers, np.uint32),
                               available_PU)), cache.states)
    )  # fmt: skip
    groups = []
    for i, (solution, passed) in enumerate(zip(solutions, reached, strict=True)):
      for state, chosen in zip(passed, chosen_PU[i], strict=True):
        if chosen:
          name = f"{reasoning_cache.group(state.problem.id, state.turn, state.summary)}/{i}"
          seed = turn_seed(seeds[i], "attempts", state.turn)
          groups.append(Group(state, name, seed, sibling=name))
          if cache.summaries > 1 and state.turn > 1:
            groups += await self._siblings(solution, groups[-1])
    spent = sum(
      len(c.tokens)
      for s in solutions
      for t in s.turns
      for c in (t.completion, t.summary_completion)
      if c
    )
    return groups, spent, buffer

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

  async def _collect(self, step: int):
    groups, roll_in, buffer = await self._groups(step)
    rollouts_PA = await asyncio.gather(*(self._attempt(g) for g in groups))
    written = groups if self.config.job == "cache_rl" and self.config.cache.summaries > 1 else []
    return rollouts_PA, written, roll_in, buffer

  async def _attempt(self, group: Group) -> list[Rollout]:
    """A graded attempts at one state."""
    problem, count = group.state.problem, self.config.rollout.attempts
    messages = reason_messages(self.templates["reason"], problem, group.state.summary)
    try:
      completions = await self.chat(
        messages, n=count, seed=group.seed, **sampling(self.config.rollout)
      )
    except RequestError as error:  # a prompt too long for the engine: no grade, and not a zero
      nothing = Completion(text="", finish_reason="length")
      lost = Grade(None, f"not sampled: {error}")
      return [rollout_of(group, messages, nothing, lost, i) for i in range(count)]
    grades = await asyncio.gather(
      *(self.grade(problem, split_proof(c.text)[1]) for c in completions)
    )
    return [
      rollout_of(group, messages, completion, grade, i)
      for i, (completion, grade) in enumerate(zip(completions, grades, strict=True))
    ]

  # --- the batch -----------------------------------------------------------------------------

  def _batch(self, rollouts_PA, written: list[Group]) -> tuple[Batch, dict[str, float]]:
    """Advantages by group, then rows of packed tokens."""
    objective = self.config.objective
    score_PA = [[r.grade.score for r in group] for group in rollouts_PA]
    reward_PA, valid_PA = rubric_rl.rewards(score_PA, max_score=MAX_SCORE)
    advantage_PA, metrics = rubric_rl.advantages(
      reward_PA, valid_PA, baseline=objective.baseline, normalize_std=objective.normalize_std
    )
    length_PA = np.array([[len(r.completion.tokens) for r in group] for group in rollouts_PA])
    cut_PA = [[r.completion.finish_reason == "length" for r in group] for group in rollouts_PA]
    weight_PA = rubric_rl.weights(
      length_PA,
      valid_PA,
      np.array(cut_PA),
      normalizer=objective.normalizer,
      overlong_filter=objective.overlong_filter,
    )
    turns = np.array([[r.turn for r in group] for group in rollouts_PA])
    by_turn = reasoning_cache.reward_by_turn(
      reward_PA.ravel(), valid_PA.ravel(), turns.ravel(), int(turns.max())
    )
    completions = [r.completion for group in rollouts_PA for r in group]
    advantage, weight = np.ravel(advantage_PA), np.ravel(weight_PA)
    if written:
      more = self._summary_rows(written, reward_PA, valid_PA, weight.max())
      completions += [c for c, _, _ in more]
      advantage = np.append(advantage, [a for _, a, _ in more])
      weight = np.append(weight, [w for _, _, w in more])
    trained = (weight > 0) & ((advantage != 0) | (not objective.drop_dead_groups))
    if not trained.any():
      trained = weight > 0
    examples = [
      token_rows(completions[i], advantage[i], weight[i]) for i in np.flatnonzero(trained)
    ]
    if not examples:
      raise ValueError(
        f"none of {reward_PA.size} rollouts could be graded ({rollouts_PA[0][0].grade.reason}): "
        "nothing to train on; mend it and run the same command to resume"
      )
    batch, _ = packing.pack_rows(
      examples, row_length=self.config.batch.row_length, rows_multiple=self.config.batch.rows
    )
    measured = finalise({**metrics, **by_turn})
    return batch, measured | {"packing_efficiency": packing.efficiency(batch.segments_BT)}

  def _summary_rows(self, groups, reward_PA, valid_PA, weight: float):
    """(completion, advantage, weight) of the summaries that have siblings to be compared with."""
    objective = self.config.objective
    rows = []
    for name in dict.fromkeys(g.sibling for g in groups if g.state.writer is not None):
      members = [i for i, g in enumerate(groups) if g.sibling == name]
      if len(members) > 1:
        reward_PM, valid_PM = reasoning_cache.summary_rewards(
          reward_PA[members][None], valid_PA[members][None]
        )
        advantage_PM, _ = rubric_rl.advantages(
          reward_PM, valid_PM, baseline=objective.baseline, normalize_std=objective.normalize_std
        )
        rows += [
          (groups[i].state.writer, float(advantage_PM[0, m]), float(weight * valid_PM[0, m]))
          for m, i in enumerate(members)
        ]
    return rows


async def gather_served(work) -> list:
  """Results in order; None for a run with a prompt that the engine cannot take (it is too long)."""
  results = await asyncio.gather(*work, return_exceptions=True)
  for result in results:
    if isinstance(result, BaseException) and not isinstance(result, RequestError):
      raise result
  return [None if isinstance(result, RequestError) else result for result in results]


async def unless(stopped: Callable[[], bool], work):
  """What `work` returns; None, and the work cancelled, once `stopped` says so."""
  task = asyncio.ensure_future(work)
  while not task.done():
    if stopped():
      task.cancel()
      await asyncio.wait([task])
      return None
    await asyncio.wait([task], timeout=STOP_POLL_S)
  return task.result()


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


def token_rows(completion: Completion, advantage: float, weight: float) -> dict[str, np.ndarray]:
  """One rollout as per-token arrays: the prompt has weight 0, the completion the rollout's."""
  prompt, length = len(completion.prompt_tokens), len(completion.tokens)

  def fill(value, dtype):
    return np.concatenate([np.zeros(prompt, dtype), np.broadcast_to(value, length).astype(dtype)])

  return {
    "tokens": np.concatenate([completion.prompt_tokens, completion.tokens]).astype(np.int32),
    "weight": fill(weight, np.float32),
    "advantage": fill(advantage, np.float32),
    "behavior_logp": fill(completion.logprobs, np.float32),
    "version": fill(completion.versions, np.int32),
  }


def length_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
  """Mean and largest completion, shares cut short and without a proof."""
  lengths = [len(r.completion.tokens) for r in rollouts]
  return {
    "length/mean": float(np.mean(lengths)),
    "length/max": float(np.max(lengths)),
    "truncation_share": float(np.mean([r.completion.finish_reason == "length" for r in rollouts])),
    "no_proof_share": float(np.mean([not split_proof(r.completion.text)[1] for r in rollouts])),
  }
