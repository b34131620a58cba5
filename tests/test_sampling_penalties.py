"""Penalties and bias: beside transformers' processors, OpenAI's formula and plain counting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qed_jax.rollout import sampling

VOCAB = 48
FULL_COUNT = sampling.PROMPT - 1

sample = jax.jit(sampling.sample, static_argnames="truncated_logp")
adjust = jax.jit(sampling.adjust)
remember = jax.jit(sampling.remember, donate_argnums=0)


def keys(rows):
  return sampling.attempt_keys(*[jnp.arange(rows, dtype=jnp.uint32)] * 3)


def controls(rows, **settings):
  """The same settings in every row, or an array of them."""
  asked = sampling.neutral(rows)
  for name, value in settings.items():
    getattr(asked, f"{name}_B")[:] = value
  return asked


def history(prompts, completions, bias=None, vocab=VOCAB):
  counts_BV = np.zeros((len(prompts), vocab), np.int32)
  for b, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
    np.add.at(counts_BV[b], np.asarray(completion, int), 1)
    counts_BV[b, sorted(set(prompt))] += sampling.PROMPT
  bias_BV = np.zeros_like(counts_BV, np.float32) if bias is None else bias
  return sampling.History(jnp.asarray(counts_BV), jnp.asarray(bias_BV))


def some_logits(seed, rows, scale=3.0):
  rng = np.random.default_rng(seed)
  return (rng.standard_normal((rows, VOCAB)) * scale).astype(np.float32)


TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=30)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, VOCAB - 1), st.booleans()), max_size=20), TOKENS)
def test_what_is_remembered_is_a_count_of_the_active_draws(draws, prompt):
  """Beside a row that is never active, and on top of the prompt's mark."""
  past = history([prompt, prompt], [[], []])
  for token, active in draws:
    past = remember(past, jnp.array([token, token]), jnp.array([active, False]))
  taken = [token for token, active in draws if active]
  expected_V = np.bincount(np.array(taken, int), minlength=VOCAB)
  expected_V[sorted(set(prompt))] += sampling.PROMPT
  np.testing.assert_array_equal(past.counts_BV[0], expected_V)
  np.testing.assert_array_equal(past.counts_BV[1], expected_V // sampling.PROMPT * sampling.PROMPT)


def test_a_full_count_stays():
  """The 65,536th occurrence does not turn into the mark of the prompt."""
  for mark in (0, sampling.PROMPT):
    past = sampling.empty_history(1, VOCAB)
    past = sampling.History(past.counts_BV.at[0, 3].set(mark + FULL_COUNT - 1), past.bias_BV)
    for _ in range(3):
      past = remember(past, jnp.array([3]), jnp.array([True]))
    assert past.counts_BV[0, 3] == mark + FULL_COUNT


def test_remembering_copies_nothing():
  """The counts are written where they are, also inside a loop."""

  @jax.jit
  def many(past):
    step = lambda i, past: sampling.remember(past, jnp.full(4, i), jnp.ones(4, bool))  # noqa: E731
    return jax.lax.fori_loop(0, 9, step, past)

  donated = jax.jit(many, donate_argnums=0)
  compiled = donated.lower(sampling.empty_history(4, 4096)).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 4096


@settings(deadline=None, max_examples=60)
@given(
  st.integers(0, 999),
  TOKENS,
  TOKENS,
  st.floats(0.5, 2),
  st.floats(-2, 2),
  st.floats(-2, 2),
  st.booleans(),
)
def test_adjusted_logits_equal_the_formulas(
  seed, prompt, completion, repetition, presence, frequency, biased
):
  """In float64: bias, then repetition, then OpenAI's mu[j] - c[j] f - float(c[j] > 0) p."""
  x_BV = some_logits(seed, 1)
  bias_BV = some_logits(seed + 1, 1)
  asked = controls(1, repetition=repetition, presence=presence, frequency=frequency, biased=biased)
  actual_V = adjust(jnp.asarray(x_BV), asked, history([prompt], [completion], bias_BV))[0]

  mu = x_BV[0].astype(np.float64) + (bias_BV[0] if biased else 0)
  for j in {*prompt, *completion}:
    mu[j] = mu[j] / repetition if mu[j] > 0 else mu[j] * repetition
  for j in range(VOCAB):
    c = completion.count(j)
    mu[j] = mu[j] - c * frequency - float(c > 0) * presence
  np.testing.assert_allclose(actual_V, mu, rtol=2e-6, atol=2e-5)


def test_rows_that_ask_for_nothing_keep_their_logits():
  """To the last bit, -0.0 and -inf too, beside rows that ask, whatever their slots hold."""
  rows = 4
  x_BV = some_logits(1, rows)
  x_BV[:, :3] = -0.0, -np.inf, 1e-30
  bias_BV = some_logits(2, rows)
  bias_BV[:3, 5] = np.nan
  past = history([range(9)] * rows, [[1, 1, 2, 3]] * rows, bias_BV)
  asked = controls(rows, biased=np.arange(rows) == 3, repetition=[1, 1, 1.3, 1])
  actual_BV = np.asarray(adjust(jnp.asarray(x_BV), asked, past))
  assert actual_BV[:2].tobytes() == x_BV[:2].tobytes()
  assert not np.isnan(actual_BV).any()
  np.testing.assert_array_equal(actual_BV[3], x_BV[3] + bias_BV[3])
  np.testing.assert_array_equal(actual_BV[2, 9:], x_BV[2, 9:])


def test_bias_forbids_and_forces():
  """-inf is never drawn, +100 always; every row at its own token, and a greedy row likewise."""
  rows = 400
  token_B = np.arange(rows) % VOCAB
  chosen_BV = np.arange(VOCAB)[None] == token_B[:, None]
  x_BV = np.zeros((rows, VOCAB), np.float32) + chosen_BV * np.float32(3)
  asked = controls(rows, biased=True, temperature=np.where(np.arange(rows) % 3 == 0, 0.0, 1.0))
  nothing = [()] * rows

  def draw(x_BV, bias):
    past = history(nothing, nothing, np.where(chosen_BV, bias, 0).astype(np.float32))
    drawn = sample(
      jnp.asarray(x_BV), keys(rows), jnp.arange(rows), asked, past, truncated_logp=False
    )
    assert drawn.finite_B.all()
    return drawn

  assert not (draw(x_BV, -np.inf).token_B == token_B).any()
  forced = draw(-x_BV, 100)
  np.testing.assert_array_equal(forced.token_B, token_B)
  np.testing.assert_array_equal(forced.logp_B, 0)


def test_a_bias_that_forbids_everything_is_flagged():
  """Nothing can be drawn: the row is as bad as one of nan."""
  bias_BV = np.full((2, VOCAB), -np.inf, np.float32)
  asked = controls(2, biased=[True, False])
  past = history([(), ()], [(), ()], bias_BV)
  drawn = sample(
    jnp.asarray(some_logits(3, 2)), keys(2), jnp.arange(2), asked, past, truncated_logp=False
  )
  np.testing.assert_array_equal(drawn.finite_B, [False, True])


def processors(bias_V=None, repetition=1.0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
  """transformers' own, in the order of its `generate`."""
  pytest.importorskip("torch")
  from transformers.generation import logits_process as hf

  chosen = hf.LogitsProcessorList()
  if bias_V is not None:
    chosen.append(hf.SequenceBiasLogitsProcessor([[[j], float(x)] for j, x in enumerate(bias_V)]))
  if repetition != 1:
    chosen.append(hf.RepetitionPenaltyLogitsProcessor(repetition))
  if temperature not in (0, 1):
    chosen.append(hf.TemperatureLogitsWarper(temperature))
  if top_k:
    chosen.append(hf.TopKLogitsWarper(top_k))
  if top_p < 1:
    chosen.append(hf.TopPLogitsWarper(top_p))
  if min_p:
    chosen.append(hf.MinPLogitsWarper(min_p))
  return chosen


HF_CASES = [
  {"repetition": 1.3},
  {"repetition": 0.7},
  {"temperature": 0.6},
  {"top_k": 7},
  {"top_p": 0.85},
  {"min_p": 0.08},
  {"top_k": 12, "top_p": 0.9, "temperature": 1.7},
  {"top_p": 0.95, "min_p": 0.05, "temperature": 1.4},
  {"repetition": 1.2, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("case", HF_CASES, ids=lambda case: "-".join(case))
def test_support_and_log_probs_equal_those_of_transformers(case, biased):
  """All that can be drawn, with the log-prob of each, is what its processors leave."""
  torch = pytest.importorskip("torch")
  rows = 64
  rng = np.random.default_rng(5)
  x_V, bias_V = some_logits(6, 1)[0], some_logits(7, 1)[0]
  prompt, completion = rng.integers(0, VOCAB, 12).tolist(), rng.integers(0, VOCAB, 9).tolist()
  chosen = processors(bias_V if biased else None, **case)
  scores = chosen(torch.tensor([prompt + completion]), torch.tensor(x_V[None]))
  expected_V = torch.log_softmax(scores.double(), dim=-1)[0].numpy()

  wide = lambda x_V: np.tile(x_V, (rows, 1))  # noqa: E731
  asked = controls(rows, biased=biased, top_logprobs=True, **case)
  past = history([prompt] * rows, [completion] * rows, wide(bias_V))
  z_BV = adjust(jnp.asarray(wide(x_V)), asked, past) / case.get("temperature", 1)
  z_BV -= z_BV.max()
  kept_BV = z_BV >= sampling.support(z_BV, jax.tree.map(jnp.asarray, asked))[:, None]
  np.testing.assert_array_equal(kept_BV, wide(expected_V > -np.inf))

  drawn = sample(
    jnp.asarray(wide(x_V)), keys(rows), jnp.arange(rows), asked, past, truncated_logp=True
  )
  np.testing.assert_allclose(drawn.logp_B, expected_V[drawn.token_B], atol=3e-6)
  order = np.argsort(-expected_V, kind="stable")[: sampling.TOP_LOGPROBS]
  np.testing.assert_allclose(drawn.top_logp_BK[0], expected_V[order], atol=3e-6)
  possible = expected_V[order] > -np.inf
  np.testing.assert_array_equal(drawn.top_tokens_BK[0][possible], order[possible])


def test_greedy_with_a_repetition_penalty_equals_transformers_token_for_token():
  """Sixty steps of a bigram model whose likeliest path goes in circles, a row a penalty."""
  torch = pytest.importorskip("torch")
  bigram_VV = some_logits(8, VOCAB)
  penalties = [1.0, 1.1, 1.5, 3.0, 0.8]
  rows = len(penalties)
  prompt = [4, 9, 4, 30]
  asked = controls(rows, temperature=0.0, repetition=penalties)
  past = history([prompt] * rows, [()] * rows)
  token_B = np.full(rows, prompt[-1])
  ours = []
  for position in range(60):
    logits_BV = jnp.asarray(bigram_VV[token_B])
    positions = jnp.full(rows, position)
    drawn = sample(logits_BV, keys(rows), positions, asked, past, truncated_logp=False)
    token_B = np.asarray(drawn.token_B)
    past = remember(past, drawn.token_B, jnp.asarray(asked.repetition_B != 1))
    ours.append(token_B)

  for b, penalty in enumerate(penalties):
    chosen, ids = processors(repetition=penalty), list(prompt)
    for _ in range(60):
      scores = chosen(torch.tensor([ids]), torch.tensor(bigram_VV[ids[-1]])[None])
      ids.append(int(scores.argmax()))
    assert [int(token_B[b]) for token_B in ours] == ids[len(prompt) :]
  assert len({int(token_B[0]) for token_B in ours}) < len({int(token_B[3]) for token_B in ours})
