"""Reasoning-cache RL: which states are trained on, what their rewards mean, where they come from.

A state is (problem, summary after turn t). The policy is run T_train turns from a start (the empty
summary, or one from the replay buffer) without gradient; `count` of the states it passed are drawn
without replacement; each gets A attempts, which form one group: rows of rubric_rl.advantages are
states, named by `group`. An attempt's reward is its own grade and nothing later (myopic), and the
loss is policy_gradient's, on the attempts' reasoning only (arXiv 2602.03773, section 6 and
appendix H).

U counts the states of one trajectory, in the order of its turns, M the summaries written in one
another's place (same problem and turn).

What is decided where paper and code differ: state 0 is the state that the trajectory started from,
also when that is a summary of the buffer (the paper's code puts the empty one there); which states
a trajectory offers is the caller's mask, T for the paper, T + 1 for QED-Nano, which also trains
on the state after the last summary. Summaries in the buffer need no importance weight: they are
conditions, never targets.
"""

import dataclasses
import hashlib
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# Different streams of one seed, so that the start and the states drawn are independent.
STATE_STREAM, START_STREAM = 1, 2


def problem_number(problem_id: str, draw: int) -> int:
  """32-bit number of a problem for key folding. `draw` tells apart repeats within one step."""
  return zlib.crc32(f"{draw}:{problem_id}".encode())


def group(problem_id: str, turn: int, summary: str) -> str:
  """Name of the state: attempts share a baseline only if they share problem and summary."""
  return f"{problem_id}/turn{turn}/{hashlib.blake2s(summary.encode()).hexdigest()[:16]}"


def choose_states(seed, step, problem_P, available_PU, count):
  """`count` of each problem's available states, uniformly without replacement -> chosen_PU bool.

  problem_P: uint32 numbers (`problem_number`). available_PU: bool, False where a trajectory ended
  early. All are chosen where no more than `count` are available. The choice for a problem depends
  on (seed, step, its number, its row of available_PU) alone. Pure, can be jitted.
  """
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STATE_STREAM), step)

  def choose(problem, available_U):
    draw_U = jax.random.uniform(jax.random.fold_in(key, problem), available_U.shape)
    rank_U = jnp.argsort(jnp.argsort(jnp.where(available_U, draw_U, 2.0)))
    return available_U & (rank_U < count)

  return jax.vmap(choose)(jnp.asarray(problem_P, jnp.uint32), jnp.asarray(available_PU, bool))


def reward_by_turn(reward_R, valid_R, turn_R, turns: int):
  """Mean reward of the valid rollouts of each turn, as metrics "reward_turn_1" .. (sum, count).

  turn_R: int, from 1 to `turns`: the turn within the trajectory. Pure, can be jitted.
  """
  reward_R = jnp.where(valid_R, reward_R, 0)
  of_turn_RU = jnp.asarray(turn_R)[:, None] == jnp.arange(1, turns + 1)[None, :]
  of_turn_RU = of_turn_RU.astype(reward_R.dtype)
  total_U = jnp.einsum("RU,R->U", of_turn_RU, reward_R)
  count_U = jnp.einsum("RU,R->U", of_turn_RU, jnp.asarray(valid_R).astype(reward_R.dtype))
  return {f"reward_turn_{u + 1}": (total_U[u], count_U[u]) for u in range(turns)}


def summary_rewards(reward_PMA, valid_PMA):
  """Reward of a summary: the mean reward of the attempts made from it -> (reward_PM, valid_PM).

  The option that trains the summariser (appendix E.1). P runs over (problem, turn), M over the
  summaries compared with one another, A over the attempts of the next turn. A summary none of whose
  attempts could be graded is not valid. rubric_rl.advantages turns the result into advantages.
  """
  valid_PMA = jnp.asarray(valid_PMA, bool)
  count_PM = jnp.sum(valid_PMA, axis=2)
  total_PM = jnp.sum(jnp.where(valid_PMA, reward_PMA, 0), axis=2)
  return total_PM / jnp.maximum(count_PM, 1), count_PM > 0


@dataclasses.dataclass(frozen=True)
class StoredSummary:
  """A summary to start from. turn: turns that led to it; version: of the policy that wrote it."""

  text: str
  turn: int
  version: int


EMPTY = StoredSummary(text="", turn=0, version=0)


@dataclasses.dataclass(frozen=True)
class SummaryBuffer:
  """The replay buffer: summaries of each problem's last trajectory. Never changed in place."""

  summaries: dict[str, tuple[StoredSummary, ...]] = dataclasses.field(default_factory=dict)


def continued(start: StoredSummary, texts: Sequence[str], version: int):
  """Summaries of a trajectory from `start`, in order: their turns count on from where it began."""
  return tuple(StoredSummary(text, start.turn + i, version) for i, text in enumerate(texts, 1))


def replace(buffer: SummaryBuffer, new: dict[str, Sequence[StoredSummary]]) -> SummaryBuffer:
  """The buffer with the summaries of each problem in `new` in place of its old ones.

  A problem whose trajectory wrote no summary keeps what it had.
  """
  stored = {problem: tuple(summaries) for problem, summaries in new.items() if summaries}
  return SummaryBuffer({**buffer.summaries, **stored})


def sample(buffer: SummaryBuffer, problem_id: str, *, seed: int, step: int, draw: int):
  """A stored summary of the problem, uniformly, or EMPTY where there is none: a trajectory's start.

  Depends on the arguments alone, never on the order of calls.
  """
  summaries = buffer.summaries.get(problem_id)
  if not summaries:
    return EMPTY
  words = np.array([seed, step, problem_number(problem_id, draw), len(summaries)], np.uint32)
  return summaries[int(jax.device_get(_uniform_index(jax.device_put(words))))]


@jax.jit
def _uniform_index(words):
  seed, step, problem, count = words
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), START_STREAM), step)
  return jax.random.randint(jax.random.fold_in(key, problem), (), 0, count.astype(jnp.int32))


def to_json(buffer: SummaryBuffer) -> dict:
  """The buffer as dicts, lists, strings and ints, for the RL state of a checkpoint."""
  return {
    problem: [dataclasses.asdict(summary) for summary in summaries]
    for problem, summaries in buffer.summaries.items()
  }


def from_json(state: dict) -> SummaryBuffer:
  """The inverse of `to_json`. Raises ValueError that names the problem of a malformed entry."""
  summaries = {}
  for problem, rows in state.items():
    try:
      summaries[problem] = tuple(StoredSummary(**row) for row in rows)
    except TypeError as error:
      raise ValueError(f"summary buffer, problem {problem!r}: {error}") from None
  return SummaryBuffer(summaries)
