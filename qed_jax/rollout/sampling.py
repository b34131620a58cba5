"""One token a row from logits: temperature, top-k, top-p, without ever sorting the vocabulary.

Everything about a row is data, so that no request compiles anything; what no row asks for is
skipped at run time. Truncation is a mask over the vocabulary and the noise of a token depends on
the row's key alone, so a row draws the same token whatever its neighbours ask for.
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Controls:
  """How each row is sampled.

  temperature_B: float32, 0 is greedy. top_k_B: int32 up to MAX_TOP_K, 0 is off. top_p_B: float32 in
  (0, 1], 1 is off; it applies to what top-k left, renormalised.
  """

  temperature_B: Any
  top_k_B: Any
  top_p_B: Any


def prompt_id(tokens) -> int:
  """A stable 32-bit name of a prompt."""
  return zlib.crc32(np.asarray(tokens, "<i4").tobytes())


def attempt_keys(seed_B, prompt_id_B, attempt_B):
  """One key an attempt: fold_in(fold_in(key(seed), prompt id), attempt); uint32 inputs."""

  def fold(seed, prompt, attempt):
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(key, prompt), attempt)

  return jax.vmap(fold)(seed_B, prompt_id_B, attempt_B)


def sample(logits_BV, key_B, position_B, controls: Controls, truncated_logp: bool):
  """Draws the token at `position_B` of each row -> (token_B int32, logp_B float32).

  logp is of the distribution after temperature: over the full vocabulary, or, with truncated_logp,
  over what top-k and top-p left. Greedy rows report it at temperature 1. Tokens tied at the edge of
  the support are all kept.
  """
  greedy_B = controls.temperature_B == 0
  temperature_B = jnp.where(greedy_B, 1, controls.temperature_B).astype(logits_BV.dtype)
  z_BV = logits_BV / temperature_B[:, None]
  kept_BV = support(z_BV, controls)
  largest_B1 = jnp.max(z_BV, axis=-1, keepdims=True)  # every support has it
  mass_BV = jnp.exp(kept_BV - largest_B1)
  drawn_B, z_drawn_B = jax.lax.cond(
    jnp.all(greedy_B),
    lambda: (jnp.zeros_like(greedy_B, jnp.int32), largest_B1[:, 0]),
    lambda: draw(kept_BV, mass_BV, jax.vmap(jax.random.fold_in)(key_B, position_B)),
  )
  first_B = jax.lax.cond(
    jnp.any(greedy_B), lambda: first_largest(z_BV, largest_B1), lambda: drawn_B
  )
  token_B = jnp.where(greedy_B, first_B, drawn_B)
  total_B = jnp.sum(mass_BV if truncated_logp else jnp.exp(z_BV - largest_B1), axis=-1)
  lse_B = largest_B1[:, 0] + jnp.log(total_B)
  logp_B = jnp.where(greedy_B, largest_B1[:, 0], z_drawn_B) - lse_B
  return token_B, logp_B.astype(jnp.float32)


def draw(z_BV, mass_BV, key_B):
  """A token by its mass -> (token_B, z of it): Gumbel-max over columns, then inside the column.

  The vocabulary is folded into a few rows; drawing a column by its mass, then a token of it, is
  drawing a token, for a fraction of the noise: at V = 151,936 it is 9,496 + 16 numbers a row.
  """
  B, V = z_BV.shape
  fold = math.gcd(V, FOLD)
  columns = V // fold

  gumbel = lambda key: jax.random.gumbel(key, (columns + fold,), z_BV.dtype)  # noqa: E731
  column_noise_BJ, token_noise_BI = jnp.split(jax.vmap(gumbel)(key_B), [columns], axis=1)
  mass_BJ = jnp.sum(mass_BV.reshape(B, fold, columns), axis=1)
  j_B = jnp.argmax(jnp.log(mass_BJ) + column_noise_BJ, axis=-1).astype(jnp.int32)
  z_BIJ = z_BV.reshape(B, fold, columns)
  z_BI = jnp.take_along_axis(z_BIJ, j_B[:, None, None], axis=2)[:, :, 0]
  i_B = jnp.argmax(z_BI + token_noise_BI, axis=-1).astype(jnp.int32)
  return i_B * columns + j_B, jnp.take_along_axis(z_BI, i_B[:, None], axis=1)[:, 0]


def first_largest(z_BV, largest_B1):
  """argmax. XLA's own reduces pairs, eight times slower than two plain reductions on a CPU."""
  vocab_BV = jax.lax.broadcasted_iota(jnp.int32, z_BV.shape, 1)
  return jnp.min(jnp.where(z_BV == largest_B1, vocab_BV, z_BV.shape[1] - 1), axis=-1)


def support(z_BV, controls: Controls):
  """z_BV with -inf where top-k or top-p drops the token."""
  top_k_B, top_p_B = controls.top_k_B, controls.top_p_B

  def within(asked_B, rule):
    everything = lambda: jnp.ones(z_BV.shape, bool)  # noqa: E731
    return jax.lax.cond(jnp.any(asked_B), rule, everything)

  def truncated():
    by_count_BV = within(top_k_B > 0, lambda: within_top_k(z_BV, top_k_B, top_p_B))
    by_mass_BV = within((top_k_B == 0) & (top_p_B < 1), lambda: within_top_p(z_BV, top_p_B))
    return jnp.where(jnp.where((top_k_B > 0)[:, None], by_count_BV, by_mass_BV), z_BV, -jnp.inf)

  return jax.lax.cond(jnp.any((top_k_B > 0) | (top_p_B < 1)), truncated, lambda: z_BV)


def within_top_k(z_BV, top_k_B, top_p_B):
  """bool [B, V]: top-k, then top-p among the k; meant for rows with top_k > 0."""
  limit = min(MAX_TOP_K, z_BV.shape[1])
  z_Bk = jax.lax.top_k(z_BV, limit)[0]
  kept_Bk = jnp.arange(limit)[None] < top_k_B[:, None]
  p_Bk = jax.nn.softmax(jnp.where(kept_Bk, z_Bk, -jnp.inf), axis=-1)
  mass_before_Bk = jnp.cumsum(p_Bk, axis=-1) - p_Bk
  kept_Bk &= (mass_before_Bk < top_p_B[:, None]) | (top_p_B == 1)[:, None]
  edge_B = jnp.min(jnp.where(kept_Bk, z_Bk, jnp.inf), axis=-1)
  return z_BV >= edge_B[:, None]


def within_top_p(z_BV, top_p_B):
  """bool [B, V]: the fewest most likely tokens that hold a mass of top_p.

  Bisects the smallest kept probability. Positive floats are ordered as their bit patterns are, so
  thirty halvings of the integers up to that of 1.0 find it exactly.
  """
  p_BV = jnp.exp(z_BV - jnp.max(z_BV, axis=-1, keepdims=True)).astype(jnp.float32)
  bits_BV = jax.lax.bitcast_convert_type(p_BV, jnp.int32)
  wanted_B = jnp.where(top_p_B == 1, 0, top_p_B) * jnp.sum(p_BV, axis=-1)

  def halve(_, bounds):
    low_B, high_B = bounds  # enough mass at or above low, too little above high
    middle_B = low_B + (high_B - low_B) // 2
    mass_B = jnp.sum(jnp.where(bits_BV >= middle_B[:, None], p_BV, 0), axis=-1)
    enough_B = mass_B >= wanted_B
    return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B)

  one = int(np.float32(1).view(np.int32))
  first = (jnp.zeros_like(bits_BV[:, 0]), jnp.full_like(bits_BV[:, 0], one + 1))
  low_B, _ = jax.lax.fori_loop(0, 30, halve, first)
  return (bits_BV >= low_B[:, None]) | (top_p_B == 1)[:, None]
