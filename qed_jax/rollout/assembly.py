"""Graded rollouts -> advantages by group -> rows of packed tokens: the Batch of an RL step."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from qed_jax.data import packing
from qed_jax.objectives import finalise, reasoning_cache, rubric_rl
from qed_jax.records import Batch, Completion, Rollout
from qed_jax.scaffolds.proof import split_proof
from qed_jax.scaffolds.reasoning_cache import State

MAX_SCORE = 7


@dataclasses.dataclass(frozen=True)
class Group:
  """A state to make attempts from, and the completion that wrote its summary, if it is trained."""

  state: State
  name: str
  seed: int
  sibling: str = ""  # states of one sibling name differ only in who wrote the summary


def assemble(
  config, rollouts_PA: Sequence[Sequence[Rollout]], written: list[Group], step: int
) -> tuple[Batch, dict[str, float]]:
  """Advantages by group, then rows of packed tokens -> (host Batch, metrics).

  config: the job's ConfigDict (objective, batch). rollouts_PA: the same number of attempts in each
  group. written: the groups whose summaries are trained too, in the order of rollouts_PA; empty
  where none are. step: the policy that is about to be trained. Raises ValueError, one line, when
  nothing could be graded.
  """
  objective = config.objective
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
    more = summary_rows(objective, written, reward_PA, valid_PA, weight.max())
    completions += [c for c, _, _ in more]
    advantage = np.append(advantage, [a for _, a, _ in more])
    weight = np.append(weight, [w for _, _, w in more])
  trained = (weight > 0) & ((advantage != 0) | (not objective.drop_dead_groups))
  if not trained.any():
    trained = weight > 0
  examples = [
    token_rows(completions[i], advantage[i], weight[i], step) for i in np.flatnonzero(trained)
  ]
  if not examples:
    raise ValueError(
      f"none of {reward_PA.size} rollouts could be graded ({rollouts_PA[0][0].grade.reason}): "
      "nothing to train on; mend it and run the same command to resume"
    )
  batch, _ = packing.pack_rows(
    examples, row_length=config.batch.row_length, rows_multiple=config.batch.rows
  )
  measured = finalise({**metrics, **by_turn})
  return batch, measured | {"packing_efficiency": packing.efficiency(batch.segments_BT)}


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


def length_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
  """Mean and largest completion, shares cut short and without a proof."""
  lengths = [len(r.completion.tokens) for r in rollouts]
  return {
    "length/mean": float(np.mean(lengths)),
    "length/max": float(np.max(lengths)),
    "truncation_share": float(np.mean([r.completion.finish_reason == "length" for r in rollouts])),
    "no_proof_share": float(np.mean([not split_proof(r.completion.text)[1] for r in rollouts])),
  }
