"""One token a row from logits, penalties to top log-probs, without ever sorting the vocabulary.

Everything about a row is data, so that no request compiles anything; what no row asks for is
skipped at run time. The order is that of Hugging Face's processors: bias, repetition, presence and
frequency -> temperature -> top-k -> top-p -> min-p. All truncation comes down to one number a row,
the least z it keeps, and the noise of a token depends on the row's key alone; so a row draws the
same token, with the same log-prob to the last bit, whatever its neighbours ask for.
"""

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MAX_TOP_K = 128  # values that lax.top_k returns a row: a static size, whatever the rows ask for
FOLD = 16  # rows that the vocabulary is folded into; divides Qwen3's on meshes of up to 16
TOP_LOGPROBS = 20  # most likely tokens that are reported, where a row asks for them
PROMPT = 1 << 16  # in a token's count: it is in the prompt. Below it: times in the completion


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Controls:
  """How each row is sampled; `neutral` turns everything off.

  temperature_B: float32 >= 0, 0 is greedy. top_k_B: int32 up to MAX_TOP_K, 0 is off. top_p_B:
  float32 in (0, 1], 1 is off; it applies to what top-k left, renormalised. min_p_B: float32 in
  [0, 1], 0 is off; drops what is less than min_p times as likely as the likeliest token.

  repetition_B: float32 > 0, 1 is off; a logit of a token in the prompt or the completion is divided
  by it if positive, else multiplied. presence_B: float32, taken off the logit of every token in the
  completion. frequency_B: float32, taken off as often as the token is in the completion. biased_B:
  bool, whether the row's bias is added. top_logprobs_B: bool, the row wants its top log-probs.
  """

  temperature_B: Any
  top_k_B: Any
  top_p_B: Any
  min_p_B: Any
  repetition_B: Any
  presence_B: Any
  frequency_B: Any
  biased_B: Any
  top_logprobs_B: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
  """What penalties and bias need, one row a slot; rows that ask for neither may hold anything.

  counts_BV: int32 >= 0, times that the token is in the completion, plus PROMPT if the prompt has
  it. bias_BV: float32, added to the logits; -inf forbids a token.
  """

  counts_BV: Any
  bias_BV: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
  """What came of a row.

  token_B: int32. logp_B: float32, nats. finite_B: bool, False where a logit is nan or +inf or all
  are -inf; the row's other fields then mean nothing. top_tokens_BK: int32 [B, TOP_LOGPROBS, or V if
  that is less], the likeliest first; top_logp_BK: float32, nats, of the distribution of logp_B;
  both 0 in rows that did not ask.
  """

  token_B: Any
  logp_B: Any
  finite_B: Any
  top_tokens_BK: Any
  top_logp_BK: Any


def neutral(rows: int) -> Controls:
  """Numpy controls of rows that are sampled at temperature 1, with everything else off."""
  full = lambda value, dtype: np.full(rows, value, dtype)  # noqa: E731
  return Controls(
    temperature_B=full(1, np.float32),
    top_k_B=full(0, np.int32),
    top_p_B=full(1, np.float32),
    min_p_B=full(0, np.float32),
    repetition_B=full(1, np.float32),
    presence_B=full(0, np.float32),
    frequency_B=full(0, np.float32),
    biased_B=full(False, bool),
    top_logprobs_B=full(False, bool),
  )


def empty_history(rows: int, vocab: int) -> History:
  """Nothing seen, no bias."""
  return History(jnp.zeros((rows, vocab), jnp.int32), jnp.zeros((rows, vocab), jnp.float32))


def remember(history: History, token_B, active_B) -> History:
  """Counts the drawn tokens, int32 [B], of rows active_B, bool [B]: B elements, in place."""

  def count(counts_V, token, active):
    room = (counts_V[token] + 1) % PROMPT > 0  # at 65,535 it stays, rather than become PROMPT
    return counts_V.at[token].add((active & room).astype(jnp.int32))

  counts_BV = jax.vmap(count)(history.counts_BV, token_B, active_B)
  return dataclasses.replace(history, counts_BV=counts_BV)


def prompt_id(tokens) -> int:
  """A stable 32-bit name of a prompt."""
  return zlib.crc32(np.asarray(tokens, "<i4").tobytes())


def attempt_keys(seed_B, prompt_id_B, attempt_B):
  """One key an attempt: fold_in(fold_in(key(seed), prompt id), attempt); uint32 inputs."""

  def fold(seed, prompt, attempt):
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(key, prompt), attempt)

  return jax.vmap(fold)(seed_B, prompt_id_B, attempt_B)


def sample(
  logits_BV, key_B, position_B, controls: Controls, history: History, truncated_logp: bool
) -> Drawn:
  """Draws the token at `position_B`, int32 [B], of each row from float32 logits [B, V].

  Log-probs are of the distribution after bias, penalties and temperature: over the full vocabulary,
  or, with truncated_logp, over what top-k, top-p and min-p left. Greedy rows report them at
  temperature 1. Tokens tied at the edge of the support are all kept.
  """
  logits_BV = adjust(logits_BV, controls, history)
  greedy_B = controls.temperature_B == 0
  temperature_B = jnp.where(greedy_B, 1, controls.temperature_B).astype(logits_BV.dtype)
  largest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
  z_BV = (logits_BV - largest_B1) / temperature_B[:, None]  # its largest is 0, in every support
  full_BJ = column_mass(z_BV)
  edge_B, mass_BJ = truncate(z_BV, full_BJ, controls)

  drawn_B, z_drawn_B = jax.lax.cond(
    jnp.all(greedy_B),
    lambda: (jnp.zeros_like(greedy_B, jnp.int32), jnp.zeros_like(edge_B)),
    lambda: draw(z_BV, edge_B, mass_BJ, jax.vmap(jax.random.fold_in)(key_B, position_B)),
  )
  first_B = jax.lax.cond(
    jnp.any(greedy_B), lambda: first_largest(logits_BV, largest_B1), lambda: drawn_B
  )
  full_B = jnp.sum(full_BJ, axis=-1)
  lse_B = jnp.log(jnp.sum(mass_BJ, axis=-1) if truncated_logp else full_B)
  least_B = edge_B if truncated_logp else jnp.full_like(edge_B, -jnp.inf)
  top_tokens_BK, top_z_BK = likeliest(z_BV, least_B, controls.top_logprobs_B)
  top_logp_BK = jnp.where(controls.top_logprobs_B[:, None], top_z_BK - lse_B[:, None], 0)
  return Drawn(
    token_B=jnp.where(greedy_B, first_B, drawn_B),
    logp_B=(jnp.where(greedy_B, 0, z_drawn_B) - lse_B).astype(jnp.float32),
    finite_B=jnp.isfinite(largest_B1[:, 0] + full_B),  # a nan, a +inf, only -inf: each shows here
    top_tokens_BK=top_tokens_BK,
    top_logp_BK=top_logp_BK.astype(jnp.float32),
  )


def adjust(logits_BV, controls: Controls, history: History):
  """Logits [B, V] after bias and penalties; bit for bit as before in rows that ask for neither."""
  row = jax.tree.map(lambda x_B: x_B[:, None], controls)  # [B, 1]

  def adjusted():
    x_BV = jnp.where(row.biased_B, logits_BV + history.bias_BV, logits_BV)
    repeated_BV = jnp.where(x_BV > 0, x_BV / row.repetition_B, x_BV * row.repetition_B)
    x_BV = jnp.where(history.counts_BV > 0, repeated_BV, x_BV)
    count_BV = history.counts_BV & (PROMPT - 1)  # in the completion
    return x_BV - row.presence_B * (count_BV > 0) - row.frequency_B * count_BV

  penalised = (row.repetition_B != 1) | (row.presence_B != 0) | (row.frequency_B != 0)
  return jax.lax.cond(jnp.any(row.biased_B | penalised), adjusted, lambda: logits_BV)


def folded(x_BV):
  """[B, V] -> [B, I, J]: token i * J + j is in row i of column j."""
  B, V = x_BV.shape
  return x_BV.reshape(B, math.gcd(V, FOLD), -1)


def column_mass(z_BV):
  """float [B, J]: exp(z) summed over each column of the folded vocabulary."""
  return jnp.sum(jnp.exp(folded(z_BV)), axis=1)


def draw(z_BV, edge_B, mass_BJ, key_B):
  """A token of z >= edge by its mass -> (token_B, z of it): Gumbel-max of columns, then in one.

  The vocabulary is folded into a few rows; drawing a column by its mass, then a token of it, is
  drawing a token, for a fraction of the noise: at V = 151,936 it is 9,496 + 16 numbers a row.
  """
  z_BIJ = folded(z_BV)
  _, fold, columns = z_BIJ.shape
  noise_BX = gumbel(key_B, columns + fold).astype(z_BV.dtype)
  column_noise_BJ, token_noise_BI = jnp.split(noise_BX, [columns], axis=1)
  j_B = jnp.argmax(jnp.log(mass_BJ) + column_noise_BJ, axis=-1).astype(jnp.int32)
  z_BI = jnp.take_along_axis(z_BIJ, j_B[:, None, None], axis=2)[:, :, 0]
  i_B = jnp.argmax(keep(z_BI, edge_B) + token_noise_BI, axis=-1).astype(jnp.int32)
  return i_B * columns + j_B, jnp.take_along_axis(z_BI, i_B[:, None], axis=1)[:, 0]


def gumbel(key_B, count: int):
  """float32 [B, count]: jax.random.gumbel of each row's threefry2x32 key, bit for bit.

  Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
  On a CPU jax compiles the rounds to a loop of some twenty small steps, which in a decode loop take
  longer than all the rest of sampling; written out they are one.
  """
  key_B2 = jax.random.key_data(key_B)
  a_B1, b_B1 = key_B2[:, :1], key_B2[:, 1:]
  schedule = (a_B1, b_B1, a_B1 ^ b_B1 ^ jnp.uint32(0x1BD11BDA))
  count_1X = jax.lax.broadcasted_iota(jnp.uint32, (1, count), 1)
  x_BX, y_BX = jnp.broadcast_to(a_B1, (len(key_B2), count)), count_1X + b_B1
  for i in range(5):
    for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
      x_BX = x_BX + y_BX
      y_BX = x_BX ^ (y_BX << rotation | y_BX >> 32 - rotation)
    x_BX = x_BX + schedule[(i + 1) % 3]
    y_BX = y_BX + schedule[(i + 2) % 3] + jnp.uint32(i + 1)
  mantissa_BX = (x_BX ^ y_BX) >> 9
  one_to_two_BX = jax.lax.bitcast_convert_type(mantissa_BX | jnp.uint32(0x3F800000), jnp.float32)
  tiny = jnp.finfo(jnp.float32).tiny
  uniform_BX = jnp.maximum(tiny, one_to_two_BX - 1 + tiny)
  return -jnp.log(-jnp.log(uniform_BX))


def first_largest(z_BV, largest_B1):
  """argmax. XLA's own reduces pairs, eight times slower than two plain reductions on a CPU."""
  vocab_BV = jax.lax.broadcasted_iota(jnp.int32, z_BV.shape, 1)
  return jnp.min(jnp.where(z_BV == largest_B1, vocab_BV, z_BV.shape[1] - 1), axis=-1)


def likeliest(z_BV, edge_B, asked_B):
  """The TOP_LOGPROBS likeliest tokens of z >= edge, and their z; both 0 where no row asks."""
  B, V = z_BV.shape
  most = min(TOP_LOGPROBS, V)

  def found():
    z_BK, token_BK = jax.lax.top_k(keep(z_BV, edge_B), most)
    return jnp.where(asked_B[:, None], token_BK, 0), z_BK

  nothing = lambda: (jnp.zeros((B, most), jnp.int32), jnp.zeros((B, most), z_BV.dtype))  # noqa: E731
  return jax.lax.cond(jnp.any(asked_B), found, nothing)


def keep(z_BX, edge_B):
  """z [B, any] with -inf below the edge."""
  return jnp.where(z_BX >= edge_B[:, None], z_BX, -jnp.inf)


def truncate(z_BV, full_BJ, controls: Controls):
  """-> (edge_B of the support, column mass [B, J] of it); full_BJ is the mass of all tokens."""

  def truncated():
    edge_B = support(z_BV, controls)
    kept_BJ = column_mass(keep(z_BV, edge_B))
    return edge_B, jnp.where(edge_B[:, None] > -jnp.inf, kept_BJ, full_BJ)

  asked_B = (controls.top_k_B > 0) | (controls.top_p_B < 1) | (controls.min_p_B > 0)
  everything = lambda: (jnp.full_like(full_BJ[:, 0], -jnp.inf), full_BJ)  # noqa: E731
  return jax.lax.cond(jnp.any(asked_B), truncated, everything)


def support(z_BV, controls: Controls):
  """edge_B: the least z that top-k, top-p and min-p keep, of z whose largest is 0; -inf is all."""
  top_k_B, top_p_B = controls.top_k_B, controls.top_p_B
  everything_B = jnp.full_like(z_BV[:, 0], -jnp.inf)

  def within(asked_B, rule):
    edge_B = jax.lax.cond(jnp.any(asked_B), rule, lambda: everything_B)
    return jnp.where(asked_B, edge_B, everything_B)

  by_count_B = within(top_k_B > 0, lambda: within_top_k(z_BV, top_k_B, top_p_B))
  by_mass_B = within((top_k_B == 0) & (top_p_B < 1), lambda: within_top_p(z_BV, top_p_B))
  return jnp.maximum(jnp.maximum(by_count_B, by_mass_B), jnp.log(controls.min_p_B))


def within_top_k(z_BV, top_k_B, top_p_B):
  """edge_B, the least z within top-k, then top-p among the k; for rows with top_k > 0."""
  limit = min(MAX_TOP_K, z_BV.shape[1])
  z_Bk = jax.lax.top_k(z_BV, limit)[0]
  kept_Bk = jnp.arange(limit)[None] < top_k_B[:, None]
  p_Bk = jax.nn.softmax(jnp.where(kept_Bk, z_Bk, -jnp.inf), axis=-1)
  mass_before_Bk = jnp.cumsum(p_Bk, axis=-1) - p_Bk
  kept_Bk &= (mass_before_Bk < top_p_B[:, None]) | (top_p_B == 1)[:, None]
  return jnp.min(jnp.where(kept_Bk, z_Bk, jnp.inf), axis=-1)


def within_top_p(z_BV, top_p_B):
  """edge_B, the least z among the fewest likeliest tokens that hold a mass of top_p.

  Bisects the smallest kept probability. Positive floats are ordered as their bit patterns are, so
  thirty halvings of the integers up to that of 1.0 find it exactly.
  """
  p_BV = jnp.exp(z_BV).astype(jnp.float32)
  bits_BV = jax.lax.bitcast_convert_type(p_BV, jnp.int32)
  wanted_B = top_p_B * jnp.sum(p_BV, axis=-1)

  def halve(_, bounds):
    low_B, high_B = bounds  # enough mass at or above low, too little above high
    middle_B = low_B + (high_B - low_B) // 2
    mass_B = jnp.sum(jnp.where(bits_BV >= middle_B[:, None], p_BV, 0), axis=-1)
    enough_B = mass_B >= wanted_B
    return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B)

  one = int(np.float32(1).view(np.int32))
  first = (jnp.zeros_like(bits_BV[:, 0]), jnp.full_like(bits_BV[:, 0], one + 1))
  low_B, _ = jax.lax.fori_loop(0, 30, halve, first)
  return jnp.min(jnp.where(bits_BV >= low_B[:, None], z_BV, jnp.inf), axis=-1)
