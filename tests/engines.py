"""Engines over the tiny model, requests for them, and what must be true of both."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qed_jax.model import qwen3
from qed_jax.rollout import sampling
from qed_jax.rollout.device import Shapes, attempt_rows
from qed_jax.rollout.engine import Engine
from qed_jax.rollout.replica import Counters
from qed_jax.rollout.requests import Piece, Request, Running
from qed_jax.sharding import make_mesh

STOP, VOCAB = 3, 64

# 40 tokens are five pages: one width of table, so that every engine of these shapes runs the same
# two programs, whatever its attempts are.
SHAPES = Shapes(
  slots=4, max_length=40, page=8, pages=0, chunk=8, prefill_rows=2, prefill_tokens=16, kv_dtype=""
)
OTHERS = {
  "lanes": 1,
  "prefill_budget": 64,
  "stop_ids": (STOP,),
  "truncated_logp": False,
  "keep_prefixes": False,
}
# Room for one attempt of the largest length and a little more: attempts push one another out.
CROWDED = {"pages": 9}


def make_engine(tiny, *, version=1, mesh=None, **changes):
  """An engine of these shapes with `changes`; without parameters when version is None."""
  config, params = tiny
  others = {name: changes.pop(name, value) for name, value in OTHERS.items()}
  engine = Engine(
    config,
    mesh=mesh or make_mesh(1, 1, 1, jax.devices()[:1]),
    shapes=dataclasses.replace(SHAPES, **changes),
    **others,
  )
  if version is not None:
    engine.set_params(params, version)
  return engine


# --- requests


def ragged_requests(count, seed=0, **changes):
  """Prompts of 1 to 17 tokens, limits of 1 to 20, greedy, plain, top-k and top-p rows."""
  rng = np.random.default_rng(seed)
  kinds = [(1.0, 1.0, 0), (0.0, 1.0, 0), (0.8, 1.0, 7), (1.2, 0.7, 0), (0.9, 0.8, 5)]
  requests = []
  for i in range(count):
    prompt = tuple(rng.integers(0, VOCAB, rng.integers(1, 18)).tolist())
    temperature, top_p, top_k = kinds[i % len(kinds)]
    given = {"seed": 5, "attempt": i % 3, "max_tokens": int(rng.integers(1, 21))}
    requests.append(Request(prompt, temperature=temperature, top_p=top_p, top_k=top_k, **given))
  return [dataclasses.replace(r, **changes) for r in requests]


def related_requests(count, seed=0, nested=False, **changes):
  """Ragged ones whose prompts begin alike: equal prompts, some that part in mid-page, and, if
  nested, some that are the beginning of others. Some have penalties, a bias, min-p, stop ids."""
  rng = np.random.default_rng(seed)
  texts = [tuple(rng.integers(0, VOCAB, 22).tolist()) for _ in range(2)]
  extras = [
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"logit_bias": ((7, 2.0), (STOP, -2.0)), "min_p": 0.05},
    {"stop_ids": (5, 11, 40), "repetition_penalty": 0.8},
  ]
  requests, ends = [], rng.permutation(VOCAB)
  for i, request in enumerate(ragged_requests(count, seed)):
    text = texts[rng.integers(2)]
    n = int(rng.integers(1, 22))
    last = text[n] if nested else next(int(t) for t in np.roll(ends, i) if t != text[n])
    prompt = (*text[:n], last)
    if i % 4 == 3:
      prompt = requests[-2].prompt_tokens
    extra = extras[i // 3 % len(extras)] if i % 3 == 0 else {}
    request = dataclasses.replace(request, prompt_tokens=prompt, attempt=i, **extra)
    requests.append(dataclasses.replace(request, **changes))
  return requests


def group(prompt, count, max_tokens, **changes):
  """Attempts 0, 1, ... at a prompt."""
  how = {"seed": 0, "max_tokens": max_tokens, "temperature": 1.0} | changes
  return [Request(tuple(prompt), attempt=attempt, **how) for attempt in range(count)]


# --- running them


def drain(engine) -> dict:
  """Steps to the end -> what became of each ticket that was not polled before."""
  results = {}
  for _ in range(5_000):
    results |= dict(engine.poll())
    if not engine.unfinished:
      return results
    engine.step()
  raise AssertionError(f"{engine.unfinished} attempts come to no end")


def alone(engine, requests) -> list:
  """Each request by itself, in an engine that has forgotten what went before."""
  results = []
  for request in requests:
    for replica in engine.replicas:
      replica.index.clear()
    results += engine.generate([request])
  return results


def since(engine, before: Counters) -> Counters:
  """What the engine has counted on since then; peak_pages is not a sum."""
  return Counters(**{name: n - getattr(before, name) for name, n in vars(engine.counters).items()})


# --- what must be true


def same(one, other) -> bool:
  """Equal tokens, finish and, bit for bit, log-probs."""
  np.testing.assert_array_equal(one.tokens, other.tokens)
  np.testing.assert_array_equal(one.logprobs, other.logprobs)
  assert one.finish_reason == other.finish_reason
  return True


def near_ties(tiny, requests, completions, others, atol=1e-5) -> int:
  """How many differ, at a token that round-off decides; all others have equal tokens, and log-probs
  within atol up to there."""
  ties = 0
  for request, one, other in zip(requests, completions, others, strict=True):
    n = min(len(one.tokens), len(other.tokens))
    differs = np.flatnonzero(one.tokens[:n] != other.tokens[:n])
    if len(differs):
      n = int(differs[0])
      pair = (int(one.tokens[n]), int(other.tokens[n]))
      assert is_near_tie(tiny, request, one.tokens[:n], pair), f"{request}: {pair} at {n}"
      ties += 1
    else:
      assert (one.finish_reason, len(one.tokens)) == (other.finish_reason, len(other.tokens))
    np.testing.assert_allclose(one.logprobs[:n], other.logprobs[:n], atol=atol)
  return ties


def is_near_tie(tiny, request, tokens, pair, round_off=1e-5) -> bool:
  """Whether logits that differ by round-off draw now one token of the pair, now the other."""
  config, params = tiny
  running = Running(0, request, SHAPES.max_length, None, slot=0)
  running.add(Piece(*[np.asarray(tokens, np.int32)] * 5))
  row_1T = np.zeros((1, SHAPES.max_length), np.int32)
  row_1T[0, : running.known] = running.context
  positions_1T = np.arange(SHAPES.max_length, dtype=np.int32)[None]
  x_1TD = _hidden(config, params, row_1T, positions_1T, np.ones_like(row_1T))
  logits_1V = np.asarray(qwen3.logits(config, params, x_1TD[:, running.known - 1]))
  rows, rng = 256, np.random.default_rng(0)
  noise_BV = round_off * np.abs(logits_1V).max() * rng.standard_normal((rows, config.vocab_size))
  many = lambda x: jnp.repeat(jnp.asarray(x), rows, axis=0)  # noqa: E731
  row = attempt_rows(1, [running], [], ())
  history = running.counts(config.vocab_size), running.bias(config.vocab_size)
  drawn = _sample(
    jnp.asarray(logits_1V + noise_BV, jnp.float32),
    many(sampling.attempt_keys(row.seed_B, row.prompt_id_B, row.attempt_B)),
    jnp.full(rows, running.known, jnp.int32),
    jax.tree.map(many, row.controls),
    sampling.History(*(many(x_V[None]) for x_V in history)),
    truncated_logp=False,
  )
  return set(pair) <= set(np.asarray(drawn.token_B).tolist())


_hidden = jax.jit(qwen3.hidden, static_argnums=0)
_sample = jax.jit(sampling.sample, static_argnames="truncated_logp")


def assert_pages_add_up(engine) -> None:
  """Every page is free, or has as many holders as attempts and the index name it."""
  for replica in engine.replicas:
    pages = replica.pages
    holders = collections.Counter(p for a in replica.running.values() for p in a.pages)
    holders.update(node.page for node in replica.index._nodes())
    assert {p: n for p in range(pages.count) if (n := pages.holders(p))} == dict(holders)
    assert pages.free + len(holders) == pages.total
    assert all(len(set(a.pages)) == len(a.pages) for a in replica.running.values())


def assert_nothing_is_left(engine) -> None:
  """No attempt, no slot, and no page that is not in the index, which gives up its own too."""
  assert (engine.unfinished, engine.waiting, engine.running) == (0, 0, 0)
  assert engine.pages_free == engine.pages_total
  assert_pages_add_up(engine)
  for replica in engine.replicas:
    assert replica.free_slots == replica.shapes.slots
    assert replica.pages.free + len(replica.index) == replica.pages.total
    replica.index.clear()
    assert replica.pages.free == replica.pages.total
