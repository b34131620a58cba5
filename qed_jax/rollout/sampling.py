"""One token a row from logits: temperature, top-k, top-p, without ever sorting the vocabulary.

Everything about a row is data, so that no request compiles anything; what no row asks for is
skipped at run time. Truncation is a mask over the vocabulary and the noise of a token depends on
the row's key alone, so a row draws the same token whatever its neighbours ask for.
"""

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MAX_TOP_K = 128  # values that lax.top_k returns a row: a static size, whatever the rows ask for


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

  def noise():
    keys = jax.vmap(jax.random.fold_in)(key_B, position_B)
    gumbel = lambda key: jax.random.gumbel(key, z_BV.shape[1:], z_BV.dtype)  # noqa: E731
    return jnp.where(greedy_B[:, None], 0, jax.vmap(gumbel)(keys))

  noise_BV = jax.lax.cond(jnp.all(greedy_B), lambda: jnp.zeros_like(z_BV), noise)
  noisy_BV = jnp.where(kept_BV, z_BV + noise_BV, -jnp.inf)
  # The first of the largest. XLA's argmax reduces pairs, eight times slower than this on a CPU.
  vocab_BV = jax.lax.broadcasted_iota(jnp.int32, z_BV.shape, 1)
  largest_BV = noisy_BV == jnp.max(noisy_BV, axis=-1, keepdims=True)
  token_B = jnp.min(jnp.where(largest_BV, vocab_BV, z_BV.shape[1] - 1), axis=-1)
  scored_BV = jnp.where(kept_BV, z_BV, -jnp.inf) if truncated_logp else z_BV
  chosen_BV = vocab_BV == token_B[:, None]
  logp_B = jnp.sum(jnp.where(chosen_BV, z_BV, 0), -1) - jax.nn.logsumexp(scored_BV, -1)
  return token_B, logp_B.astype(jnp.float32)


def support(z_BV, controls: Controls):
  """bool [B, V]: the tokens that top-k and top-p leave."""
  top_k_B, top_p_B = controls.top_k_B, controls.top_p_B
  everything = lambda: jnp.ones(z_BV.shape, bool)  # noqa: E731
  by_count_BV = jax.lax.cond(
    jnp.any(top_k_B > 0), lambda: within_top_k(z_BV, top_k_B, top_p_B), everything
  )
  by_mass_BV = jax.lax.cond(
    jnp.any((top_k_B == 0) & (top_p_B < 1)), lambda: within_top_p(z_BV, top_p_B), everything
  )
  return jnp.where((top_k_B > 0)[:, None], by_count_BV, by_mass_BV)


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
