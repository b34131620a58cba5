"""The nouns that the parts hand to one another: frozen dataclasses, no logic."""

import dataclasses
from typing import Any

import jax
import numpy as np

EMPTY_INT = np.zeros(0, np.int32)
EMPTY_FLOAT = np.zeros(0, np.float32)


@dataclasses.dataclass(frozen=True)
class Problem:
  """A statement to prove. `rubric` is the 0-7 marking scheme, `answer` a final answer if any."""

  id: str
  statement: str
  rubric: str = ""
  answer: str = ""
  solution: str = ""
  source: str = ""
  level: str = ""
  category: str = ""


@dataclasses.dataclass(frozen=True)
class Usage:
  """Tokens read and written by model calls, and seconds spent waiting for them."""

  input_tokens: int = 0
  output_tokens: int = 0
  seconds: float = 0.0
  calls: int = 0


@dataclasses.dataclass(frozen=True)
class Completion:
  """One sampled answer.

  text: decoded tokens without the final stop token.
  tokens: int32 [n], with the stop token when finish_reason is "stop"; empty for HTTP endpoints.
  logprobs: float32 [n], of the distribution sampled from, after temperature.
  versions: int32 [n], the policy version that sampled each token.
  prompt_tokens: int32 [m].
  finish_reason: "stop" or "length".
  top_tokens, top_logprobs: int32 and float32 [n, k], the k likeliest tokens where they were asked.
  """

  text: str
  tokens: np.ndarray = dataclasses.field(default_factory=lambda: EMPTY_INT)
  logprobs: np.ndarray = dataclasses.field(default_factory=lambda: EMPTY_FLOAT)
  versions: np.ndarray = dataclasses.field(default_factory=lambda: EMPTY_INT)
  prompt_tokens: np.ndarray = dataclasses.field(default_factory=lambda: EMPTY_INT)
  finish_reason: str = "stop"
  usage: Usage = Usage()
  top_tokens: np.ndarray = dataclasses.field(default_factory=lambda: EMPTY_INT)
  top_logprobs: np.ndarray = dataclasses.field(default_factory=lambda: EMPTY_FLOAT)


@dataclasses.dataclass(frozen=True)
class Grade:
  """score: 0..7, or None when the proof could not be graded (an outage is never a zero).

  votes: the scores of several readings, where there were several.
  """

  score: int | None
  reason: str = ""
  feedback: str = ""
  usage: Usage = Usage()
  votes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Turn:
  """One turn of the reasoning cache. `index` counts from 1; the last turn has no summary."""

  index: int
  summary_before: str
  completion: Completion
  proof: str
  summary_completion: Completion | None = None
  summary_after: str = ""


@dataclasses.dataclass(frozen=True)
class Call:
  """One model call of a scaffold.

  stage: what it was for ("reason", "verify", ...). depth: the length of the longest chain of calls
  that had to end before this one could begin, plus one. error: why it failed, in one line; its
  completion is then empty.
  """

  stage: str
  messages: tuple[dict[str, str], ...]
  completion: Completion
  depth: int
  error: str = ""


@dataclasses.dataclass(frozen=True)
class Solution:
  """What a scaffold returns: the proof, the turns of a reasoning cache, and every call it made."""

  problem: Problem
  proof: str
  turns: tuple[Turn, ...] = ()
  calls: tuple[Call, ...] = ()


@dataclasses.dataclass(frozen=True)
class GradedProof:
  """A proof with the score (0..7) that people gave it: what a judge is compared with."""

  problem: Problem
  proof: str
  score: int
  source: str = ""


@dataclasses.dataclass(frozen=True)
class Rollout:
  """A graded attempt. Attempts with the same `group` share prompt and baseline.

  turn counts from 1; summary is what the prompt held of the turns before it.
  """

  problem: Problem
  messages: tuple[dict[str, str], ...]
  completion: Completion
  grade: Grade
  group: str
  attempt: int
  turn: int = 1
  summary: str = ""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """Packed rows, every array [B, T], aligned at the target: entry t speaks of tokens[t].

  tokens_BT: int32. positions_BT: int32, from 0 in each segment. segments_BT: int32, 1, 2, ... in a
  row, 0 is padding. weight_BT: float32, the weight of token t as a target: 0 where nothing is
  trained, already divided by the step's normaliser, so that losses of microbatches add up.
  advantage_BT, behavior_logp_BT, reference_logp_BT: float32. lag_BT: int32, policy updates since
  the token was sampled. None where a job has no use for them.
  """

  tokens_BT: Any
  positions_BT: Any
  segments_BT: Any
  weight_BT: Any
  advantage_BT: Any = None
  behavior_logp_BT: Any = None
  reference_logp_BT: Any = None
  lag_BT: Any = None
