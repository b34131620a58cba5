"""Prefill and decode against the full forward, against `score`, and against transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qed_jax.model import qwen3
from qed_jax.records import Batch
from qed_jax.rollout import sampler, sampling, weights
from qed_jax.sharding import make_mesh, replicate

SLOTS, LENGTH, BUCKET, CHUNK = 4, 40, 16, 12
PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [3, 3, 0, 1]]


def one_device():
  return make_mesh(1, 1, 1, jax.devices()[:1])


def start(config, params, prompts, temperature, remaining, mesh=None):
  """A state whose slots hold the prompts, ready to decode; slot b is attempt b at its prompt."""
  mesh = mesh or one_device()
  rows = len(prompts)
  tokens_PT = np.zeros((rows, BUCKET), np.int32)
  for row, prompt in enumerate(prompts):
    tokens_PT[row, : len(prompt) - 1] = prompt[:-1]
  full = lambda x, dtype=np.int32: np.broadcast_to(np.asarray(x, dtype), (rows,)).copy()  # noqa: E731
  attempts = sampler.Attempts(
    slot_B=np.arange(rows, dtype=np.int32),
    row_B=np.arange(rows, dtype=np.int32),
    token_B=np.array([p[-1] for p in prompts], np.int32),
    position_B=np.array([len(p) - 1 for p in prompts], np.int32),
    remaining_B=full(remaining),
    seed_B=full(3, np.uint32),
    prompt_id_B=np.array([sampling.prompt_id(p) for p in prompts], np.uint32),
    attempt_B=np.arange(rows, dtype=np.uint32),
    controls=sampling.Controls(full(temperature, np.float32), full(0), full(1, np.float32)),
  )
  with jax.set_mesh(mesh):
    state = sampler.create_state(config, SLOTS, LENGTH, mesh)
    k_LPTKH, v_LPTKH = sampler.prefill(config, params, replicate(mesh, tokens_PT))
    return sampler.admit(state, k_LPTKH, v_LPTKH, replicate(mesh, attempts))


def run(config, params, prompts, *, temperature, remaining, stop_ids=(), mesh=None, fewest=1):
  """(final state, Chunk on the host) of one decode call."""
  mesh = mesh or one_device()
  state = start(config, params, prompts, temperature, remaining, mesh)
  return decode(config, params, state, stop_ids, mesh, fewest)


def decode(config, params, state, stop_ids=(), mesh=None, fewest=1):
  mesh = mesh or one_device()
  how = {"chunk": CHUNK, "stop_ids": stop_ids, "truncated_logp": False}
  with jax.set_mesh(mesh):
    state, chunk = sampler.decode(config, params, state, replicate(mesh, np.int32(fewest)), **how)
  return state, jax.device_get(chunk)


def as_trainer(config, params):
  return params


def as_sampler(config, params):
  return weights.sampler_params(config, params, one_device())


LAYOUTS = pytest.mark.parametrize("layout", [as_trainer, as_sampler])


def score_of(config, params, prompts, completions, temperature):
  """The trainer's log-probs of the completions, one row each."""
  rows = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
  tokens_BT = np.zeros((len(rows), LENGTH), np.int32)
  segments_BT = np.zeros_like(tokens_BT)
  for b, row in enumerate(rows):
    tokens_BT[b, : len(row)], segments_BT[b, : len(row)] = row, 1
  positions_BT = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens_BT.shape)
  batch = Batch(jnp.asarray(tokens_BT), jnp.asarray(positions_BT), jnp.asarray(segments_BT), None)
  scorer = jax.jit(qwen3.score, static_argnums=(0, 3, 4))
  logp_BT = np.asarray(scorer(config, params, batch, temperature, LENGTH)[0])
  return [
    logp_BT[b, len(p) : len(row)] for b, (p, row) in enumerate(zip(prompts, rows, strict=True))
  ]


@LAYOUTS
def test_greedy_equals_the_argmax_of_a_full_forward(tiny, layout):
  """Decoding with the cache picks the tokens that running the whole text again picks."""
  config, params = tiny
  _, chunk = run(config, layout(config, params), PROMPTS, temperature=0.0, remaining=CHUNK)

  @jax.jit
  def next_token(tokens_BT, last_B):
    positions_BT = jnp.broadcast_to(jnp.arange(LENGTH), tokens_BT.shape)
    x_BTD = qwen3.hidden(config, params, tokens_BT, positions_BT, jnp.ones_like(tokens_BT))
    x_BD = jnp.take_along_axis(x_BTD, last_B[:, None, None], 1)[:, 0]
    return jnp.argmax(qwen3.logits(config, params, x_BD), -1)

  texts = [list(p) for p in PROMPTS]
  for _ in range(CHUNK):
    tokens_BT = np.array([t + [0] * (LENGTH - len(t)) for t in texts], np.int32)
    last_B = jnp.array([len(t) - 1 for t in texts])
    for text, token in zip(texts, np.asarray(next_token(tokens_BT, last_B)), strict=True):
      text.append(int(token))
  assert chunk.tokens_BC.tolist() == [t[len(p) :] for t, p in zip(texts, PROMPTS, strict=True)]


@LAYOUTS
@pytest.mark.parametrize("tied", [True, False])
def test_log_probs_equal_score_also_of_pad_and_stop_ids(tiny_with, layout, tied):
  """With a vocabulary of six, ids 0 (pad) and 1 (a stop id elsewhere) are sampled in mid-row."""
  config = tiny_with(vocab_size=6, tie_word_embeddings=tied)
  params = qwen3.init_params(config, jax.random.key(1), jnp.float32)
  prompts = [[t % 6 for t in p] for p in PROMPTS]
  _, chunk = run(config, layout(config, params), prompts, temperature=2.0, remaining=CHUNK)
  assert {0, 1} <= set(chunk.tokens_BC[:, :-1].ravel().tolist())
  expected = score_of(config, params, prompts, chunk.tokens_BC.tolist(), 2.0)
  np.testing.assert_allclose(chunk.logp_BC, np.stack(expected), atol=1e-4)


def test_greedy_equals_transformers_token_for_token(tiny_with):
  """The same weights in torch's Qwen3, its own `generate`, its own KV cache."""
  torch = pytest.importorskip("torch", reason="torch is installed on the main lane only")
  from transformers import Qwen3Config, Qwen3ForCausalLM

  config = tiny_with(num_kv_heads=1, tie_word_embeddings=False, rope_theta=5e6)
  params = qwen3.init_params(config, jax.random.key(2), jnp.float32)
  theirs = Qwen3ForCausalLM(
    Qwen3Config(
      vocab_size=config.vocab_size,
      hidden_size=config.hidden_size,
      intermediate_size=config.intermediate_size,
      num_hidden_layers=config.num_layers,
      num_attention_heads=config.num_heads,
      num_key_value_heads=config.num_kv_heads,
      head_dim=config.head_dim,
      rope_theta=config.rope_theta,
      max_position_embeddings=config.max_position,
      rms_norm_eps=config.rms_norm_eps,
      tie_word_embeddings=False,
      eos_token_id=None,
      pad_token_id=0,
    )
  ).eval()
  state = {}
  for path, x in qwen3.flatten(params).items():
    x = torch.from_numpy(np.array(x))
    if path.startswith("layers."):
      for i in range(config.num_layers):
        state[f"model.{path.replace('layers.', f'layers.{i}.')}.weight"] = x[i]
    else:
      state["lm_head.weight" if path == "lm_head" else f"model.{path}.weight"] = x
  shapes = {name: x.shape for name, x in theirs.state_dict().items()}
  theirs.load_state_dict({name: x.reshape(shapes[name]) for name, x in state.items()})
  _, chunk = run(config, as_sampler(config, params), PROMPTS, temperature=0.0, remaining=CHUNK)
  for prompt, tokens in zip(PROMPTS, chunk.tokens_BC.tolist(), strict=True):
    ids = torch.tensor([prompt])
    out = theirs.generate(
      ids, attention_mask=torch.ones_like(ids), max_new_tokens=CHUNK, do_sample=False
    )
    assert out[0, len(prompt) :].tolist() == tokens


def test_stop_token_is_kept_and_ends_the_attempt(tiny):
  """Tokens up to and with the first stop id, as without stopping; nothing is sampled after it."""
  config, params = tiny
  params = as_sampler(config, params)
  _, free = run(config, params, PROMPTS, temperature=1.0, remaining=CHUNK)
  stop = int(free.tokens_BC[0, 4])
  state, chunk = run(config, params, PROMPTS, temperature=1.0, remaining=CHUNK, stop_ids=(stop, 63))
  for b in range(SLOTS):
    tokens = free.tokens_BC[b].tolist()
    ends = [i + 1 for i, t in enumerate(tokens) if t in (stop, 63)] or [CHUNK]
    assert chunk.count_B[b] == ends[0]
    assert chunk.tokens_BC[b, : ends[0]].tolist() == tokens[: ends[0]]
    np.testing.assert_array_equal(chunk.logp_BC[b, : ends[0]], free.logp_BC[b, : ends[0]])
  assert chunk.count_B[0] <= 5
  assert not np.any(chunk.remaining_B)


def test_each_slot_has_its_own_limit(tiny):
  """remaining_B counts down to 0; slots without it sample nothing; the rest goes on next call."""
  config, params = tiny
  state, chunk = run(config, params, PROMPTS, temperature=1.0, remaining=[3, 0, CHUNK + 5, CHUNK])
  assert chunk.count_B.tolist() == [3, 0, CHUNK, CHUNK]
  assert chunk.remaining_B.tolist() == [0, 0, 5, 0]
  positions = [len(p) - 1 + n for p, n in zip(PROMPTS, chunk.count_B, strict=True)]
  assert state.position_B.tolist() == positions


def test_the_loop_ends_when_too_few_slots_are_busy(tiny):
  """With fewest=3 of 4, decoding returns as soon as two are done."""
  config, params = tiny
  limits = [2, 4, CHUNK, CHUNK]
  _, chunk = run(config, params, PROMPTS, temperature=1.0, remaining=limits, fewest=3)
  assert chunk.count_B.tolist() == [2, 4, 4, 4]


def test_two_calls_equal_one(tiny):
  """Where the host cuts the decode into calls does not show in tokens or log-probs."""
  config, params = tiny
  params = as_sampler(config, params)
  _, whole = run(config, params, PROMPTS, temperature=1.0, remaining=CHUNK)
  state, first = run(
    config, params, PROMPTS, temperature=1.0, remaining=[5, CHUNK, CHUNK, CHUNK], fewest=4
  )
  assert first.count_B.tolist() == [5] * 4
  _, rest = decode(config, params, state)
  for name in ("tokens_BC", "logp_BC"):
    joined = np.concatenate([getattr(first, name)[1:, :5], getattr(rest, name)[1:, : CHUNK - 5]], 1)
    np.testing.assert_array_equal(joined, getattr(whole, name)[1:])


def test_what_a_slot_held_before_does_not_show(tiny):
  """A slot is reused without clearing: the new attempt samples as in a fresh cache."""
  config, params = tiny
  params = as_sampler(config, params)
  _, fresh = run(config, params, PROMPTS, temperature=1.0, remaining=CHUNK)
  others = start(config, params, [[9] * 16, [8] * 15, [7] * 16, [6] * 16], 1.0, CHUNK)
  used, _ = decode(config, params, others)
  state = start(config, params, PROMPTS, 1.0, CHUNK)
  left_behind = jax.tree.map(
    lambda old, new: jnp.concatenate([new[:, :, :, :BUCKET], old[:, :, :, BUCKET:]], 3),
    used.kv_cache,
    state.kv_cache,
  )
  assert np.any(left_behind.k_LBKSH[:, :, :, BUCKET:])
  _, chunk = decode(config, params, dataclasses.replace(state, kv_cache=left_behind))
  np.testing.assert_array_equal(chunk.tokens_BC, fresh.tokens_BC)
  np.testing.assert_array_equal(chunk.logp_BC, fresh.logp_BC)


def test_the_state_is_donated(tiny):
  """The cache is updated in place: the state that went in is gone."""
  config, params = tiny
  state = start(config, params, PROMPTS, 1.0, CHUNK)
  decode(config, params, state)
  assert state.kv_cache.k_LBKSH.is_deleted()
  assert state.position_B.is_deleted()


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 8)])
def test_eight_devices_equal_one(tiny_with, shape):
  """Slots over data and fsdp, heads over tensor: the same tokens, log-probs to round-off."""
  config = tiny_with(num_heads=8, num_kv_heads=8)
  params = qwen3.init_params(config, jax.random.key(4), jnp.float32)
  results = []
  for mesh in (one_device(), make_mesh(*shape)):
    own = weights.sampler_params(config, params, mesh)
    results.append(run(config, own, PROMPTS, temperature=1.0, remaining=CHUNK, mesh=mesh))
  (_, one), (state, eight) = results
  np.testing.assert_array_equal(eight.tokens_BC, one.tokens_BC)
  np.testing.assert_allclose(eight.logp_BC, one.logp_BC, atol=1e-5)
  assert len(state.kv_cache.k_LBKSH.sharding.device_set) == 8
  per_device = state.kv_cache.k_LBKSH.addressable_shards[0].data.size
  assert per_device * 8 == state.kv_cache.k_LBKSH.size


def test_sampler_params_compute_what_the_trainers_do(tiny_with):
  """Cast once to the compute dtype; the view inside jit has the trainer's paths and shapes."""
  config = tiny_with(dtype="bfloat16", tie_word_embeddings=False)
  params = qwen3.init_params(config, jax.random.key(5), jnp.float32)
  own = as_sampler(config, params)
  assert {x.dtype for x in jax.tree.leaves(own)} == {jnp.dtype("bfloat16")}
  view = jax.jit(lambda p: weights.model_view(config, p)[1])(own)
  for path, x in qwen3.flatten(params).items():
    if path.startswith("layers."):
      layers = [qwen3.flatten(view["layers"][i])[path[7:]] for i in range(config.num_layers)]
      got = jnp.stack(layers)
    else:
      got = view[path]
    np.testing.assert_array_equal(got, x.astype(jnp.bfloat16))
