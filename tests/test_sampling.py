"""One token a row: the distribution drawn from, what is reported of it, and what it depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from qed_jax.rollout import sampling
from qed_jax.rollout.sampling import Controls

VOCAB = 16


def keys(rows, seed=0):
  zeros = jnp.zeros(rows, jnp.uint32)
  return sampling.attempt_keys(zeros + seed, zeros, zeros)


def controls(rows, temperature=1.0, top_k=0, top_p=1.0):
  full = lambda value, dtype: jnp.broadcast_to(jnp.asarray(value, dtype), (rows,))  # noqa: E731
  return Controls(full(temperature, jnp.float32), full(top_k, jnp.int32), full(top_p, jnp.float32))


sample = jax.jit(sampling.sample, static_argnums=4)


def reference_support(logits, temperature, top_k, top_p):
  """Top-k, then top-p among what it left, by sorting: in float64."""
  z = logits.astype(np.float64) / temperature
  order = np.argsort(-z, kind="stable")[: top_k or None]
  p = np.exp(z[order] - z[order].max())
  p /= p.sum()
  keep = order[np.cumsum(p) - p < top_p] if top_p < 1 else order
  out = np.zeros(len(logits), bool)
  out[keep] = True
  return out


def reference_distribution(logits, temperature, top_k, top_p):
  kept = reference_support(logits, temperature, top_k, top_p)
  z = np.where(kept, logits.astype(np.float64) / temperature, -np.inf)
  p = np.exp(z - z.max())
  return p / p.sum()


CASES = [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.8), (0.8, 6, 0.7)]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), CASES)
def test_drawn_tokens_follow_the_distribution(temperature, top_k, top_p):
  """Chi-square of 20,000 draws, one a position; no draw leaves the support."""
  draws = 20_000
  logits = np.random.default_rng(1).standard_normal(VOCAB).astype(np.float32) * 1.5
  asked = controls(draws, temperature, top_k, top_p)
  logits_BV = jnp.broadcast_to(jnp.asarray(logits), (draws, VOCAB))
  token_B, _ = sample(logits_BV, keys(draws), jnp.arange(draws), asked, False)
  p = reference_distribution(logits, temperature, top_k, top_p)
  counts = np.bincount(np.asarray(token_B), minlength=VOCAB)
  assert counts[p == 0].sum() == 0
  inside = p > 0
  statistic = ((counts - draws * p)[inside] ** 2 / (draws * p[inside])).sum()
  assert statistic < stats.chi2.ppf(1 - 1e-4, inside.sum() - 1)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.3), (0, 0.9), (0, 0.999), (3, 1.0), (9, 0.5)])
def test_support_equals_that_of_a_sort(top_k, top_p):
  """Thresholds and bisection leave exactly the tokens that sorting leaves."""
  rng = np.random.default_rng(2)
  logits_BV = (rng.standard_normal((32, 300)) * rng.uniform(0.1, 8, (32, 1))).astype(np.float32)
  kept_BV = sampling.support(jnp.asarray(logits_BV), controls(32, 1.0, top_k, top_p)) > -jnp.inf
  expected_BV = [reference_support(row, 1.0, top_k, top_p) for row in logits_BV]
  np.testing.assert_array_equal(np.asarray(kept_BV), np.array(expected_BV))


def test_greedy_takes_the_first_of_the_largest():
  """Temperature 0 is argmax, noise or not, and reports the log-prob at temperature 1."""
  logits_BV = np.random.default_rng(3).standard_normal((4, VOCAB)).astype(np.float32)
  logits_BV[1, [4, 9]] = 7.0
  asked = controls(4, [0.0, 0.0, 0.0, 1.0], [0, 0, 3, 0])
  token_B, logp_B = sample(jnp.asarray(logits_BV), keys(4), jnp.arange(4), asked, False)
  np.testing.assert_array_equal(np.asarray(token_B)[:3], logits_BV.argmax(1)[:3])
  assert token_B[1] == 4
  expected_BV = jax.nn.log_softmax(logits_BV)
  np.testing.assert_allclose(logp_B, [expected_BV[b, token_B[b]] for b in range(4)], atol=1e-6)


@pytest.mark.parametrize("truncated_logp", [False, True])
def test_log_prob_is_of_the_tempered_distribution(truncated_logp):
  """Over the full vocabulary, or over the support when that is asked for."""
  rows = 64
  logits = np.random.default_rng(4).standard_normal(VOCAB).astype(np.float32)
  asked = controls(rows, 0.6, 4, 0.9)
  logits_BV = jnp.broadcast_to(jnp.asarray(logits), (rows, VOCAB))
  token_B, logp_B = sample(logits_BV, keys(rows), jnp.arange(rows), asked, truncated_logp)
  p = reference_distribution(logits, 0.6, *((4, 0.9) if truncated_logp else (0, 1.0)))
  np.testing.assert_allclose(logp_B, np.log(p[np.asarray(token_B)]), atol=1e-6)


def test_a_row_draws_the_same_whatever_its_neighbours_ask_for():
  """Beside greedy, top-k and top-p rows, alone, and in another order: the same tokens."""
  rng = np.random.default_rng(5)
  logits_BV = jnp.asarray(rng.standard_normal((12, VOCAB)), jnp.float32)
  prompt_B, attempt_B = jnp.arange(12, dtype=jnp.uint32), jnp.arange(12, dtype=jnp.uint32) % 3
  key_B = sampling.attempt_keys(prompt_B * 0 + 7, prompt_B, attempt_B)
  position_B = jnp.arange(12) * 5
  kinds = [(1.0, 0, 1.0), (0.0, 0, 1.0), (0.9, 4, 1.0), (1.1, 0, 0.6)]
  temperature, top_k, top_p = zip(*[kinds[b % 4] for b in range(12)], strict=True)
  asked = controls(12, temperature, top_k, top_p)
  together_B, logp_B = sample(logits_BV, key_B, position_B, asked, False)

  def pick(rows):
    return jax.tree.map(lambda x: x[rows], (logits_BV, key_B, position_B, asked))

  shuffled = rng.permutation(12)
  token_B, _ = sample(*pick(shuffled), False)
  np.testing.assert_array_equal(token_B, np.asarray(together_B)[shuffled])
  for b in range(12):
    token_1, logp_1 = sample(*pick(np.array([b])), False)
    assert token_1[0] == together_B[b]
    np.testing.assert_allclose(logp_1[0], logp_B[b], atol=1e-6)


def test_noise_differs_by_seed_prompt_attempt_and_position():
  """Changing any one of the four changes what is drawn from a flat distribution."""
  logits_BV = jnp.zeros((1, 1000))

  def draw(seed, prompt, attempt, position):
    names = [jnp.array([x], jnp.uint32) for x in (seed, prompt, attempt)]
    key_B = sampling.attempt_keys(*names)
    return int(sample(logits_BV, key_B, jnp.array([position]), controls(1), False)[0][0])

  base = (3, 5, 7, 11)
  changed = [tuple(x + (i == j) for j, x in enumerate(base)) for i in range(4)]
  assert len({draw(*names) for names in [base, *changed]}) == 5
  assert draw(*base) == draw(*base)


def test_prompt_id_is_stable_and_of_the_tokens():
  """The same number on every machine, whatever sequence type holds the tokens."""
  assert sampling.prompt_id([1, 2, 3]) == 2_967_478_931 == sampling.prompt_id(np.arange(1, 4))
  assert sampling.prompt_id([1, 2, 3]) != sampling.prompt_id([1, 3, 2])


def test_the_vocabulary_is_never_sorted():
  """No sort in what sample traces to, with every control on."""
  args = (jnp.zeros((2, 500)), keys(2), jnp.arange(2), controls(2, 1.0, 3, 0.5), False)
  traced = str(jax.make_jaxpr(sampling.sample, static_argnums=4)(*args))
  assert "top_k[" in traced
  assert " sort[" not in traced
