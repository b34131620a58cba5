"""One token a row: the distribution drawn from, what is reported of it, and what it depends on."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from qed_jax.rollout import sampling

VOCAB = 16
PROMPT_TOKENS, COMPLETION = (1, 2, 2, 5), (2, 7, 7, 7, 11)
BIAS = {3: 2.0, 7: -1.0, 9: -np.inf}
PENALTIES = {"repetition": 1.4, "presence": 0.3, "frequency": 0.2}
KINDS = {
  "plain": {},
  "cool": {"temperature": 0.7},
  "hot": {"temperature": 1.3},
  "top-k": {"temperature": 1.3, "top_k": 5},
  "top-p": {"top_p": 0.8},
  "top-k and top-p": {"temperature": 0.8, "top_k": 6, "top_p": 0.7},
  "min-p": {"min_p": 0.1},
  "all that truncates": {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.15},
  "repetition": {"repetition": 1.5},
  "presence": {"presence": 0.9},
  "frequency": {"frequency": -0.4},
  "bias": {"biased": True},
  "everything": {"temperature": 0.9, "top_k": 8, "top_p": 0.9, "min_p": 0.02, "biased": True}
  | PENALTIES,
  "greedy": {"temperature": 0.0},
  "greedy with penalties": {"temperature": 0.0, "biased": True} | PENALTIES,
}


def keys(rows, seed=0):
  zeros = jnp.zeros(rows, jnp.uint32)
  return sampling.attempt_keys(zeros + seed, zeros, zeros)


def controls(*kinds, top_logprobs=False):
  """One row a dict of settings."""
  asked = sampling.neutral(len(kinds))
  for b, kind in enumerate(kinds):
    for name, value in ({"top_logprobs": top_logprobs} | kind).items():
      getattr(asked, f"{name}_B")[b] = value
  return asked


def history(rows, vocab=VOCAB):
  """Every row has the same prompt, completion and bias."""
  counts_V, bias_V = np.zeros(vocab, np.int32), np.zeros(vocab, np.float32)
  np.add.at(counts_V, list(COMPLETION), 1)
  counts_V[list(PROMPT_TOKENS)] += sampling.PROMPT
  bias_V[list(BIAS)] = list(BIAS.values())
  return sampling.History(*(jnp.asarray(np.tile(x_V, (rows, 1))) for x_V in (counts_V, bias_V)))


traced_sample = jax.jit(sampling.sample, static_argnames="truncated_logp")


def sample(logits_BV, asked, position_B=None, key_B=None, past=None, truncated_logp=False):
  rows, vocab = logits_BV.shape
  drawn = traced_sample(
    jnp.asarray(logits_BV),
    keys(rows) if key_B is None else key_B,
    jnp.arange(rows) if position_B is None else position_B,
    asked,
    history(rows, vocab) if past is None else past,
    truncated_logp=truncated_logp,
  )
  return jax.tree.map(np.asarray, drawn)


def log_softmax(z):
  """float64; -inf stays."""
  z = np.asarray(z, np.float64)
  return z - z.max() - np.log(np.exp(z - z.max()).sum())


def reference_support(z, top_k=0, top_p=1.0, min_p=0.0):
  """bool [V]: top-k, top-p among what it left, min-p; by sorting, in float64. Ties stay."""
  order = np.argsort(-z, kind="stable")[: top_k or None]
  p = np.exp(log_softmax(z[order]))
  kept = z >= z[order[(np.cumsum(p) - p < top_p) | (top_p == 1)][-1]]
  return kept & (np.exp(z - z.max()) >= min_p)


def reference(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, biased=False, **penalties):
  """(full, truncated): float64 log-probs after everything that the row asks for."""
  x = logits.astype(np.float64)
  if biased:
    x[list(BIAS)] += list(BIAS.values())
  for token in {*PROMPT_TOKENS, *COMPLETION}:
    factor = penalties.get("repetition", 1)
    x[token] = x[token] / factor if x[token] > 0 else x[token] * factor
  for token in set(COMPLETION):
    count = COMPLETION.count(token)
    x[token] -= penalties.get("presence", 0) + count * penalties.get("frequency", 0)
  z = x / (temperature or 1)
  kept = reference_support(z, top_k, top_p, min_p)
  return log_softmax(z), log_softmax(np.where(kept, z, -np.inf))


def assert_follows(tokens, logp):
  """G-test of drawn tokens against log-probs; rare tokens share a bin, impossible ones are none."""
  p = np.exp(logp)
  counts = np.bincount(tokens, minlength=len(p))
  assert counts[p == 0].sum() == 0
  expected = len(tokens) * p
  rare = expected < 8
  counts = np.append(counts[~rare], counts[rare].sum())
  expected = np.append(expected[~rare], expected[rare].sum())
  counts, expected = counts[expected > 0], expected[expected > 0]
  statistic = 2 * (counts * np.log(np.maximum(counts, 1e-9) / expected)).sum()
  assert statistic < stats.chi2.ppf(1 - 1e-5, max(len(counts) - 1, 1))


def some_logits(seed, rows=None, vocab=VOCAB, scale=1.5):
  shape = (vocab,) if rows is None else (rows, vocab)
  return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_tokens_follow_the_distribution(kind):
  """20,000 draws, one a position; no draw leaves the support."""
  draws = 20_000
  logits = some_logits(1)
  asked = jax.tree.map(lambda x_B: np.repeat(x_B, draws), controls(KINDS[kind]))
  tokens_B = sample(np.tile(logits, (draws, 1)), asked).token_B
  logp = reference(logits, **KINDS[kind])[1]
  if KINDS[kind].get("temperature") == 0:
    assert (tokens_B == logp.argmax()).all()
  else:
    assert_follows(tokens_B, logp)


@pytest.mark.parametrize("vocab", [VOCAB, 18, 13, 96])
def test_rows_of_every_kind_follow_theirs_in_one_batch(vocab):
  """Vocabularies that fold by 16, by 2 and not at all."""
  draws = 4_000
  logits = some_logits(2, vocab=vocab)
  asked = jax.tree.map(lambda x_B: np.tile(x_B, draws), controls(*KINDS.values()))
  rows = draws * len(KINDS)
  tokens_B = sample(np.tile(logits, (rows, 1)), asked, past=history(rows, vocab)).token_B
  for b, kind in enumerate(KINDS.values()):
    logp = reference(logits, **kind)[1]
    if kind.get("temperature") != 0:
      assert_follows(tokens_B[b :: len(KINDS)], logp)


@pytest.mark.parametrize(
  ("top_k", "top_p", "min_p"),
  [(0, 0.3, 0), (0, 0.9, 0), (0, 0.999, 0), (3, 1, 0), (9, 0.5, 0), (0, 1, 0.02), (40, 0.9, 0.01)],
)
def test_support_equals_that_of_a_sort(top_k, top_p, min_p):
  """Thresholds and bisection leave exactly the tokens that sorting leaves."""
  rng = np.random.default_rng(2)
  z_BV = (rng.standard_normal((32, 300)) * rng.uniform(0.1, 8, (32, 1))).astype(np.float32)
  z_BV -= z_BV.max(axis=1, keepdims=True)
  asked = controls(*[{"top_k": top_k, "top_p": top_p, "min_p": min_p}] * 32)
  edge_B = sampling.support(jnp.asarray(z_BV), jax.tree.map(jnp.asarray, asked))
  expected_BV = [reference_support(z.astype(np.float64), top_k, top_p, min_p) for z in z_BV]
  np.testing.assert_array_equal(z_BV >= np.asarray(edge_B)[:, None], np.array(expected_BV))


traced_support = jax.jit(sampling.support)


@settings(deadline=None, max_examples=150)
@given(
  st.lists(st.integers(-2000, 0) | st.just(-np.inf), min_size=VOCAB - 1, max_size=VOCAB - 1),
  st.integers(0, VOCAB + 3),
  st.floats(1e-3, 1),
  st.just(0) | st.floats(1e-6, 1),
)
def test_support_of_any_logits_is_between_those_of_slightly_other_limits(z, top_k, top_p, min_p):
  """Ties, forbidden tokens, extreme limits: never empty, and right but for the last digits."""
  z = np.array([0.0, *z], np.float32) / 64
  asked = controls({"top_k": top_k, "top_p": top_p, "min_p": min_p})
  edge = np.asarray(traced_support(jnp.asarray(z[None]), asked))[0]
  kept = (z >= edge) & (z > -np.inf)
  slack = 1e-5
  z = z.astype(np.float64)
  tight = reference_support(z, top_k, top_p * (1 - slack), min(min_p * (1 + slack), 1))
  loose = reference_support(z, top_k, min(top_p * (1 + slack), 1), min_p * (1 - slack))
  assert kept[0]
  assert not (tight & (z > -np.inf) & ~kept).any()
  assert not (kept & ~loose).any()


def test_greedy_takes_the_first_of_the_largest():
  """Temperature 0 is argmax, noise or not, and reports the log-prob at temperature 1."""
  logits_BV = some_logits(3, 4)
  logits_BV[1, [4, 9]] = 7.0
  greedy = {"temperature": 0.0}
  drawn = sample(logits_BV, controls(greedy, greedy, greedy | {"top_k": 3}, {}))
  np.testing.assert_array_equal(drawn.token_B[:3], logits_BV.argmax(1)[:3])
  assert drawn.token_B[1] == 4
  expected_B = [log_softmax(x)[token] for x, token in zip(logits_BV, drawn.token_B, strict=True)]
  np.testing.assert_allclose(drawn.logp_B, expected_B, atol=1e-6)


def test_a_temperature_near_zero_is_greedy():
  """Down to 1e-30: the likeliest token, with a log-prob of zero and nothing that overflows."""
  logits_BV = some_logits(4, 3, scale=50)
  drawn = sample(logits_BV, controls(*[{"temperature": t} for t in (1e-3, 1e-10, 1e-30)]))
  np.testing.assert_array_equal(drawn.token_B, logits_BV.argmax(1))
  np.testing.assert_array_equal(drawn.logp_B, 0)
  assert drawn.finite_B.all()


@pytest.mark.parametrize("truncated_logp", [False, True])
def test_log_probs_are_of_the_distribution_drawn_from(truncated_logp):
  """Of the drawn token and of the likeliest, in nats: over all tokens, or over the support."""
  logits_BV = some_logits(5, len(KINDS), vocab=96)
  asked = controls(*KINDS.values(), top_logprobs=True)
  drawn = sample(logits_BV, asked, truncated_logp=truncated_logp)
  for b, kind in enumerate(KINDS.values()):
    logp = reference(logits_BV[b], **kind)[truncated_logp]
    np.testing.assert_allclose(drawn.logp_B[b], logp[drawn.token_B[b]], atol=2e-6)
    expected = np.sort(logp)[::-1][: sampling.TOP_LOGPROBS]
    np.testing.assert_allclose(drawn.top_logp_BK[b], expected, atol=2e-6)
    likely = expected > -np.inf
    np.testing.assert_array_equal(
      drawn.top_tokens_BK[b][likely], np.argsort(-logp)[: sampling.TOP_LOGPROBS][likely]
    )


def test_the_drawn_token_has_one_log_prob():
  """The one among the likeliest equals its own to the last bit, and rows that ask not have none."""
  rows = 3 * len(KINDS)
  asked = controls(*itertools.islice(itertools.cycle(KINDS.values()), rows))
  asked.top_logprobs_B[::2] = True
  drawn = sample(some_logits(6, rows), asked)
  assert drawn.top_tokens_BK.shape == drawn.top_logp_BK.shape == (rows, VOCAB)
  for b in range(rows):
    if b % 2:
      assert not drawn.top_tokens_BK[b].any() and not drawn.top_logp_BK[b].any()
    else:
      assert drawn.top_logp_BK[b, drawn.top_tokens_BK[b] == drawn.token_B[b]] == drawn.logp_B[b]


@pytest.mark.parametrize("truncated_logp", [False, True])
def test_a_row_is_the_same_to_the_last_bit_whatever_its_neighbours_ask_for(truncated_logp):
  """Each kind of row beside all others, and beside plain ones; non-finite rows disturb nobody."""
  kinds = [*KINDS.values(), *({**kind, "top_logprobs": True} for kind in KINDS.values()), {}, {}]
  rows = len(kinds)
  logits_BV = some_logits(7, rows, vocab=96)
  logits_BV[-2, 5], logits_BV[-1, 3] = np.nan, np.inf
  together = sample(logits_BV, controls(*kinds), truncated_logp=truncated_logp)
  plain_BV = some_logits(8, rows, vocab=96)
  for b, kind in enumerate(kinds[:-2]):
    among_plain = [kind if row == b else {} for row in range(rows)]
    mixed_BV = np.where(np.arange(rows)[:, None] == b, logits_BV, plain_BV)
    apart = sample(mixed_BV, controls(*among_plain), truncated_logp=truncated_logp)
    for field in dataclasses.fields(sampling.Drawn):
      x_B, y_B = getattr(together, field.name), getattr(apart, field.name)
      assert x_B[b].tobytes() == y_B[b].tobytes(), (kind, field.name)


def test_a_row_draws_the_same_alone_and_in_another_order():
  """The noise is of the row's key and position."""
  rng = np.random.default_rng(9)
  rows = len(KINDS)
  logits_BV = some_logits(9, rows)
  key_B = sampling.attempt_keys(*(jnp.arange(rows, dtype=jnp.uint32) % n for n in (1, rows, 3)))
  position_B = np.arange(rows) * 5
  asked = controls(*KINDS.values())
  together = sample(logits_BV, asked, position_B, key_B)

  def pick(chosen):
    picked = jax.tree.map(lambda x_B: x_B[chosen], (logits_BV, asked, position_B, key_B))
    return sample(*picked)

  shuffled = rng.permutation(rows)
  np.testing.assert_array_equal(pick(shuffled).token_B, together.token_B[shuffled])
  for b in range(rows):
    alone = pick(np.array([b]))
    assert alone.token_B[0] == together.token_B[b]
    np.testing.assert_allclose(alone.logp_B[0], together.logp_B[b], atol=1e-6)


def test_a_row_with_a_non_finite_logit_is_flagged_alone():
  """nan, +inf, nothing but -inf; one -inf is a forbidden token. The token stays in range."""
  logits_BV = some_logits(10, 8, vocab=300)
  logits_BV[1, 7] = np.nan
  logits_BV[2, 299] = np.inf
  logits_BV[3] = -np.inf
  logits_BV[4, :-1] = -np.inf
  logits_BV[6] = np.nan
  logits_BV[7, [0, 250]] = np.inf, -np.inf
  for kind in KINDS.values():
    drawn = sample(logits_BV, controls(*[kind] * 8, top_logprobs=True))
    np.testing.assert_array_equal(
      drawn.finite_B, [True, False, False, False, True, True, False, False]
    )
    assert drawn.token_B[4] == 299
    assert ((drawn.token_B >= 0) & (drawn.token_B < 300)).all()
    assert np.isfinite(drawn.logp_B[drawn.finite_B]).all()


def test_noise_differs_by_seed_prompt_attempt_and_position():
  """Changing any one of the four changes what is drawn from a flat distribution."""
  logits_BV = np.zeros((1, 1000), np.float32)

  def draw(seed, prompt, attempt, position):
    names = [jnp.array([x], jnp.uint32) for x in (seed, prompt, attempt)]
    key_B = sampling.attempt_keys(*names)
    return int(sample(logits_BV, controls({}), jnp.array([position]), key_B).token_B[0])

  base = (3, 5, 7, 11)
  changed = [tuple(x + (i == j) for j, x in enumerate(base)) for i in range(4)]
  assert len({draw(*names) for names in [base, *changed]}) == 5
  assert draw(*base) == draw(*base)


def test_prompt_id_is_stable_and_of_the_tokens():
  """The same number on every machine, whatever sequence type holds the tokens."""
  assert sampling.prompt_id([1, 2, 3]) == 2_967_478_931 == sampling.prompt_id(np.arange(1, 4))
  assert sampling.prompt_id([1, 2, 3]) != sampling.prompt_id([1, 3, 2])


ROWS, WIDE = 2, 512
ABSTRACT = jax.tree.map(
  lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype),
  (
    np.zeros((ROWS, WIDE), np.float32),
    keys(ROWS),
    np.zeros(ROWS, np.int32),
    sampling.neutral(ROWS),
    history(ROWS, WIDE),
  ),
)


@pytest.mark.parametrize("truncated_logp", [False, True])
def test_the_vocabulary_is_never_sorted(truncated_logp):
  """No sort in what sample traces to, nor in what becomes of it."""
  lowered = traced_sample.trace(*ABSTRACT, truncated_logp=truncated_logp)
  assert "top_k[" in str(lowered.jaxpr)
  assert " sort[" not in str(lowered.jaxpr)
  assert " sort(" not in lowered.lower().compile().as_text()


def test_what_no_row_asks_for_is_skipped():
  """Top-k, bisection and noise are inside conds, and only adjusted logits come out of one."""
  jaxpr = traced_sample.trace(*ABSTRACT, truncated_logp=False).jaxpr.jaxpr

  def calls(eqn):
    inner = [p for p in eqn.params.values() if hasattr(p, "jaxpr")]
    return [] if eqn.primitive.name == "cond" else inner

  def outside_conds(jaxpr):
    for eqn in jaxpr.eqns:
      yield eqn
      for inner in calls(eqn):
        yield from outside_conds(inner.jaxpr)

  always = list(outside_conds(jaxpr))
  conds = [eqn for eqn in always if eqn.primitive.name == "cond"]
  wide = [x for eqn in conds for x in eqn.outvars if x.aval.shape == (ROWS, WIDE)]
  assert len(wide) == 1
  costly = {"top_k", "while", "scan", "argmax", "log1p", "random_bits", "erf_inv", "gather"}
  assert not costly & {eqn.primitive.name for eqn in always}


def test_no_request_compiles_anything():
  """One compiled program whatever the rows ask for."""
  before = traced_sample._cache_size()
  for kind in KINDS.values():
    sample(np.zeros((ROWS, 40), np.float32), controls({}, kind, top_logprobs=True))
  assert traced_sample._cache_size() == before + 1


@pytest.mark.parametrize("count", [1, 17, 272, 9624])
def test_the_noise_is_that_of_jax(count):
  """To the last bit, whatever the key; so are the platforms that share the formula."""
  words = np.random.default_rng(count).integers(0, 2**32, (3, 40), dtype=np.uint32)
  words[:, :2] = 0, 2**32 - 1
  key_B = sampling.attempt_keys(*words)
  expected = jax.vmap(lambda key: jax.random.gumbel(key, (count,), jnp.float32))(key_B)
  np.testing.assert_array_equal(jax.jit(sampling.gumbel, static_argnums=1)(key_B, count), expected)
