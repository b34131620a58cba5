"""Graded rollouts -> advantages by group -> rows of packed tokens: the Batch of an RL step.

A group lives on one host, which packs its tokens; what normalises a step is the same on all hosts,
since every host knows the marks (scores, lengths) of every rollout.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from qed_jax import hosts
from qed_jax.data import packing
from qed_jax.objectives import finalise, reasoning_cache, rubric_rl
from qed_jax.records import Batch, Completion, Rollout
from qed_jax.scaffolds.proof import split_proof
from qed_jax.scaffolds.reasoning_cache import State

MAX_SCORE = 7
ROWS = {"tokens": np.int32, "positions": np.int32, "segments": np.int32, "weight": np.float32}
ROWS |= {"advantage": np.float32, "behavior_logp": np.float32, "lag": np.int32}


@dataclasses.dataclass(frozen=True)
class Group:
  """A state to make attempts from, and the completion that wrote its summary, if it is trained."""

  state: State
  name: str
  seed: int
  sibling: str = ""  # states of one sibling name differ only in who wrote the summary


@dataclasses.dataclass(frozen=True)
class Marks:
  """What a step has to know of all its rollouts, whichever host they are on: lists [P][A].

  lag: (sum, count, largest) of the updates since its tokens were sampled. reason: why a rollout has
  no score, of one of them.
  """

  score: list
  length: list
  cut: list
  no_proof: list
  turn: list
  lag: list
  reason: str = ""


def marks(rollouts_PA: Sequence[Sequence[Rollout]], step: int) -> Marks:
  """The marks of one host's rollouts, plain numbers; step: the policy about to be trained."""

  def each(mark):
    return [[mark(rollout) for rollout in group] for group in rollouts_PA]

  def lag(rollout):
    since = step - rollout.completion.versions
    return [int(since.sum()), len(since), int(since.max(initial=0))]

  return Marks(
    score=each(lambda r: r.grade.score),
    length=each(lambda r: len(r.completion.tokens)),
    cut=each(lambda r: r.completion.finish_reason == "length"),
    no_proof=each(lambda r: not split_proof(r.completion.text)[1]),
    turn=each(lambda r: r.turn),
    lag=each(lag),
    reason=next((r.grade.reason for group in rollouts_PA for r in group), ""),
  )


def assemble(
  config,
  rollouts_PA: Sequence[Sequence[Rollout]],
  written: list[Group],
  step: int,
  everyone: Sequence[Marks],
) -> tuple[Batch, dict[str, float]]:
  """Advantages by group, then rows of packed tokens -> (this host's rows, metrics of the step).

  config: the job's ConfigDict (objective, batch). rollouts_PA: this host's, the same number of
  attempts in each group. written: the groups whose summaries are trained too, in the order of
  rollouts_PA; empty where none are. step: the policy that is about to be trained. everyone: the
  marks of every host's rollouts, this one's among them. All hosts get the same number of rows, and
  the same metrics. Raises ValueError, one line, when nothing could be graded on any of them.
  """
  objective = config.objective

  def all_of(field: str) -> list:
    return [group for one in everyone for group in getattr(one, field)]

  reward_PA, valid_PA = rubric_rl.rewards(all_of("score"), max_score=MAX_SCORE)
  advantage_PA, metrics = rubric_rl.advantages(
    reward_PA, valid_PA, baseline=objective.baseline, normalize_std=objective.normalize_std
  )
  weight_PA = rubric_rl.weights(
    np.array(all_of("length")),
    valid_PA,
    np.array(all_of("cut")),
    normalizer=objective.normalizer,
    overlong_filter=objective.overlong_filter,
  )
  turns = np.array(all_of("turn"))
  by_turn = reasoning_cache.reward_by_turn(
    reward_PA.ravel(), valid_PA.ravel(), turns.ravel(), int(turns.max())
  )
  before = sum(len(one.score) for one in everyone[: hosts.index()])
  mine = slice(before, before + len(rollouts_PA))
  completions = [r.completion for group in rollouts_PA for r in group]
  advantage, weight = np.ravel(advantage_PA[mine]), np.ravel(weight_PA[mine])
  if written:
    largest = np.max(weight_PA)
    more = summary_rows(objective, written, reward_PA[mine], valid_PA[mine], largest)
    completions += [c for c, _, _ in more]
    advantage = np.append(advantage, [a for _, a, _ in more])
    weight = np.append(weight, [w for _, _, w in more])
  trained = (weight > 0) & ((advantage != 0) | (not objective.drop_dead_groups))
  live, graded = hosts.totals(int(trained.sum()), int((weight > 0).sum()))
  if not graded:
    reason = next((one.reason for one in everyone if one.reason), "")
    raise ValueError(
      f"none of {reward_PA.size} rollouts could be graded ({reason}): "
      "nothing to train on; mend it and run the same command to resume"
    )
  if not live:
    trained = weight > 0
  examples = [
    token_rows(completions[i], advantage[i], weight[i], step) for i in np.flatnonzero(trained)
  ]
  batch = rows_of_this_host(examples, config.batch)
  full, slots = hosts.totals(int(np.count_nonzero(batch.segments_BT)), batch.segments_BT.size)
  measured = finalise({**metrics, **by_turn}) | length_metrics(everyone)
  return batch, measured | {"packing_efficiency": full / slots}


def rows_of_this_host(examples: list[dict[str, np.ndarray]], block) -> Batch:
  """Packs this host's examples, perhaps none, into as many rows as the fullest host needs.

  block: config.batch; `rows` is what the rows of all hosts together are a multiple of.
  """
  multiple = block.rows // hosts.count()
  if examples:
    batch, _ = packing.pack_rows(examples, row_length=block.row_length, rows_multiple=multiple)
  else:
    nothing = {name: np.zeros((0, block.row_length), kind) for name, kind in ROWS.items()}
    batch = Batch(**{f"{name}_BT": array for name, array in nothing.items()})
  rows = max(hosts.gather(len(batch.tokens_BT)))
  missing = rows - len(batch.tokens_BT)
  return jax.tree.map(lambda x: np.pad(x, ((0, missing), (0, 0))), batch) if missing else batch


def summary_rows(objective, groups: list[Group], reward_PA, valid_PA, weight: float):
  """(completion, advantage, weight) of the summaries that have siblings to be compared with."""
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


def token_rows(
  completion: Completion, advantage: float, weight: float, step: int
) -> dict[str, np.ndarray]:
  """One rollout as per-token arrays: the prompt has weight 0, the completion the rollout's."""
  prompt, length = len(completion.prompt_tokens), len(completion.tokens)

  def fill(value, dtype):
    return np.concatenate([np.zeros(prompt, dtype), np.broadcast_to(value, length).astype(dtype)])

  return {
    "tokens": np.concatenate([completion.prompt_tokens, completion.tokens]).astype(np.int32),
    "weight": fill(weight, np.float32),
    "advantage": fill(advantage, np.float32),
    "behavior_logp": fill(completion.logprobs, np.float32),
    "lag": fill(step - completion.versions, np.int32),
  }


def length_metrics(everyone: Sequence[Marks]) -> dict[str, float]:
  """Mean and largest completion, shares cut short and without a proof, and how old tokens are.

  lag: policy updates between the version that sampled a token and the policy about to be trained.
  """
  length, cut, no_proof, lag = (
    [x for one in everyone for group in getattr(one, field) for x in group]
    for field in ("length", "cut", "no_proof", "lag")
  )
  since, tokens, oldest = np.array(lag).T
  return {
    "length/mean": float(np.mean(length)),
    "length/max": float(np.max(length)),
    "truncation_share": float(np.mean(cut)),
    "no_proof_share": float(np.mean(no_proof)),
    "lag/mean": float(since.sum() / max(tokens.sum(), 1)),
    "lag/max": float(oldest.max()),
  }
