"""Prefill and decode against the full forward, against `score`, and against transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qed_jax.model import kv_cache as kv
from qed_jax.model import qwen3
from qed_jax.records import Batch
from qed_jax.rollout import sampler, sampling, weights
from qed_jax.sharding import make_mesh, replica_meshes, replicate

SLOTS, LENGTH, PAGE, CHUNK = 4, 40, 8, 12
PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [3, 3, 0, 1]]


def one_device():
  return make_mesh(1, 1, 1, jax.devices()[:1])


def table_of(page=PAGE):
  """A table of LENGTH tokens for every slot, pages in no order, and how many pages there are."""
  each = -(-LENGTH // page)
  pages = SLOTS * each + 4
  order = 1 + np.random.default_rng(5).permutation(pages - 1)[: SLOTS * each]
  return order.reshape(SLOTS, each).astype(np.int32), pages


def whole(prompts):
  """Each prompt in one piece, all in one call."""
  return [[(b, 0, len(p) - 1) for b, p in enumerate(prompts)]]


def create(config, params, mesh, page=PAGE, kv_dtype=""):
  """Free slots and empty pages; params say whether the layers are stacked."""
  numbered = 0 in params["layers"]
  pages = table_of(page)[1]
  return sampler.create_state(config, SLOTS, pages, page, kv_dtype or config.dtype, numbered, mesh)


def prefill(config, params, state, prompts, mesh, calls=None, page=PAGE):
  """The state with the prompts in the pages, computed in the (slot, first, count) of each call."""
  table_BP = table_of(page)[0]
  for pieces in calls or whole(prompts):
    R, T = len(pieces), max(count for _, _, count in pieces)
    tokens_RT = np.full((R, max(1, T)), 9, np.int32)
    for row, (b, first, count) in enumerate(pieces):
      tokens_RT[row, :count] = prompts[b][first : first + count]
    slot_R, first_R, count_R = np.array(pieces, np.int32).T
    rows = (tokens_RT, first_R.copy(), count_R.copy(), table_BP[slot_R])
    with jax.set_mesh(mesh):
      kv_cache = sampler.prefill(config, params, state.kv_cache, *replicate(mesh, rows))
    state = dataclasses.replace(state, kv_cache=kv_cache)
  return state


def admit(state, prompts, temperature, remaining, mesh, stop_ids=()):
  """Slot b decodes attempt b at prompt b."""
  rows = len(prompts)
  full = lambda x, dtype=np.int32: np.broadcast_to(np.asarray(x, dtype), (rows,)).copy()  # noqa: E731
  stop_BS = np.full((rows, sampler.MAX_STOP_IDS), sampler.NO_TOKEN, np.int32)
  stop_BS[:, : len(stop_ids)] = stop_ids
  attempts = sampler.Attempts(
    slot_B=np.arange(rows, dtype=np.int32),
    token_B=np.array([p[-1] for p in prompts], np.int32),
    position_B=np.array([len(p) - 1 for p in prompts], np.int32),
    remaining_B=full(remaining),
    seed_B=full(3, np.uint32),
    prompt_id_B=np.array([sampling.prompt_id(p) for p in prompts], np.uint32),
    attempt_B=np.arange(rows, dtype=np.uint32),
    stop_BS=stop_BS,
    controls=dataclasses.replace(
      sampling.neutral(rows), temperature_B=full(temperature, np.float32)
    ),
  )
  with jax.set_mesh(mesh):
    return sampler.admit(state, replicate(mesh, attempts))


def start(config, params, prompts, *, temperature=1.0, remaining=CHUNK, stop_ids=(), mesh=None,
          page=PAGE, calls=None, kv_dtype=""):  # fmt: skip
  """A state whose slots hold the prompts, ready to decode."""
  mesh = mesh or one_device()
  state = create(config, params, mesh, page, kv_dtype)
  state = prefill(config, params, state, prompts, mesh, calls, page)
  return admit(state, prompts, temperature, remaining, mesh, stop_ids)


def decode(config, params, state, *, mesh=None, fewest=1, page=PAGE, chunk=CHUNK):
  """(final state, Chunk on the host) of one decode call."""
  mesh = mesh or one_device()
  how = {"chunk": chunk, "truncated_logp": False}
  rows = replicate(mesh, (table_of(page)[0], np.int32(fewest)))
  with jax.set_mesh(mesh):
    state, sampled = sampler.decode(config, params, state, *rows, **how)
  return state, jax.device_get(sampled)


def run(config, params, prompts, *, fewest=1, mesh=None, page=PAGE, **how):
  state = start(config, params, prompts, mesh=mesh, page=page, **how)
  return decode(config, params, state, mesh=mesh, fewest=fewest, page=page)


def as_trainer(config, params):
  return params


def as_sampler(config, params):
  return weights.sampler_params(config, params, one_device())[0]


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
  _, free = run(config, params, PROMPTS)
  stop = int(free.tokens_BC[0, 4])
  state, chunk = run(config, params, PROMPTS, stop_ids=(stop, 63))
  for b in range(SLOTS):
    tokens = free.tokens_BC[b].tolist()
    ends = [i + 1 for i, t in enumerate(tokens) if t in (stop, 63)] or [CHUNK]
    assert chunk.count_B[b] == ends[0]
    assert chunk.tokens_BC[b, : ends[0]].tolist() == tokens[: ends[0]]
    np.testing.assert_array_equal(chunk.logp_BC[b, : ends[0]], free.logp_BC[b, : ends[0]])
  assert chunk.count_B[0] <= 5
  assert chunk.ended_B.all() and not chunk.failed_B.any()
  assert not np.any(state.remaining_B)


def test_each_slot_has_its_own_limit(tiny):
  """remaining_B counts down to 0; slots without it sample nothing; the rest goes on next call."""
  config, params = tiny
  state, chunk = run(config, params, PROMPTS, remaining=[3, 0, CHUNK + 5, CHUNK])
  assert chunk.count_B.tolist() == [3, 0, CHUNK, CHUNK]
  assert chunk.ended_B.tolist() == [True, True, False, True]
  assert state.remaining_B.tolist() == [0, 0, 5, 0]
  positions = [len(p) - 1 + n for p, n in zip(PROMPTS, chunk.count_B, strict=True)]
  assert state.position_B.tolist() == positions
  assert chunk.steps == CHUNK


def test_the_loop_ends_when_too_few_slots_are_busy(tiny):
  """With fewest=3 of 4, decoding returns as soon as two are done."""
  config, params = tiny
  limits = [2, 4, CHUNK, CHUNK]
  state, chunk = run(config, params, PROMPTS, remaining=limits, fewest=3)
  assert chunk.count_B.tolist() == [2, 4, 4, 4]
  assert chunk.steps == 4
  _, nothing = decode(config, params, state, fewest=3)
  assert (nothing.count_B.tolist(), nothing.steps) == ([0, 0, 0, 0], 0)


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
@LAYOUTS
def test_two_calls_equal_one(tiny, layout, kv_dtype):
  """Where the host cuts the decode into calls does not show in tokens or log-probs."""
  config, params = tiny
  params = layout(config, params)
  how = {"kv_dtype": kv_dtype}
  _, all_at_once = run(config, params, PROMPTS, **how)
  limits = [5, CHUNK, CHUNK, CHUNK]
  state, first = run(config, params, PROMPTS, remaining=limits, fewest=4, **how)
  assert first.count_B.tolist() == [5] * 4
  _, rest = decode(config, params, state)
  for name in ("tokens_BC", "logp_BC"):
    joined = np.concatenate([getattr(first, name)[1:, :5], getattr(rest, name)[1:, : CHUNK - 5]], 1)
    np.testing.assert_array_equal(joined, getattr(all_at_once, name)[1:])


@LAYOUTS
@pytest.mark.parametrize("page", [3, LENGTH])
def test_the_size_of_pages_does_not_show(tiny, layout, page):
  """Pages that divide no length, or one for all: the same tokens, log-probs to round-off."""
  config, params = tiny
  params = layout(config, params)
  _, expected = run(config, params, PROMPTS)
  _, chunk = run(config, params, PROMPTS, page=page)
  np.testing.assert_array_equal(chunk.tokens_BC, expected.tokens_BC)
  np.testing.assert_allclose(chunk.logp_BC, expected.logp_BC, atol=1e-5)


# (slot, first position, tokens) of the pieces of PROMPTS, less the last token, in each call.
SPLITS = {
  "over calls": [[(2, 0, 4), (0, 0, 2)], [(2, 4, 4), (3, 0, 3)], [(2, 8, 2)]],
  "in one call": [[(2, 0, 4), (2, 4, 4), (2, 8, 2), (0, 0, 2), (3, 0, 3)]],
  "one by one": [[(0, 0, 1), (2, 0, 1)], *([(2, i, 1), (3, 1, 0)] for i in range(1, 10)),
                 [(3, 0, 3), (0, 1, 1)]],
}  # fmt: skip


@LAYOUTS
@pytest.mark.parametrize("split", SPLITS)
def test_a_prompt_in_pieces_is_the_prompt(tiny, layout, split):
  """Pieces over several calls, or as several rows of one: the pages hold the same, and so on."""
  config, params = tiny
  params = layout(config, params)
  for page in (PAGE, 3):
    expected_pages = start(config, params, PROMPTS, page=page).kv_cache
    found_pages = start(config, params, PROMPTS, page=page, calls=SPLITS[split]).kv_cache
    for one, other in zip(*map(jax.tree.leaves, (expected_pages, found_pages)), strict=True):
      np.testing.assert_allclose(one, other, atol=1e-5)
  _, expected = run(config, params, PROMPTS)
  _, chunk = run(config, params, PROMPTS, calls=SPLITS[split])
  np.testing.assert_array_equal(chunk.tokens_BC, expected.tokens_BC)
  np.testing.assert_allclose(chunk.logp_BC, expected.logp_BC, atol=1e-5)


@LAYOUTS
def test_what_pages_and_slots_held_before_does_not_show(tiny, layout):
  """They are reused without clearing: the new attempts sample, bit for bit, as in fresh ones."""
  config, params = tiny
  params = layout(config, params)
  _, fresh = run(config, params, PROMPTS)
  mesh = one_device()
  others = [[9] * 16, [8] * 15, [7] * 16, [6] * 16]
  used, _ = decode(config, params, start(config, params, others, stop_ids=(1, 2, 3)))
  assert all(np.any(x) for x in jax.tree.leaves(used.kv_cache))
  state = prefill(config, params, used, PROMPTS, mesh)
  state = admit(state, PROMPTS, 1.0, CHUNK, mesh)
  _, chunk = decode(config, params, state)
  np.testing.assert_array_equal(chunk.tokens_BC, fresh.tokens_BC)
  np.testing.assert_array_equal(chunk.logp_BC, fresh.logp_BC)


@LAYOUTS
def test_a_copied_page_is_the_page(tiny, layout):
  """An attempt on copies of another's pages samples what the other would."""
  config, params = tiny
  params = layout(config, params)
  mesh, prompt = one_device(), PROMPTS[2]
  prompts, limits = [prompt] * SLOTS, [0, 0, 0, CHUNK]
  computed = [[(3, 0, len(prompt) - 1)]]
  _, expected = run(config, params, prompts, remaining=limits, calls=computed)
  state = prefill(config, params, create(config, params, mesh), [prompt], mesh)
  table_BP, pages = table_of()
  target_R = np.array([table_BP[3, 0], table_BP[3, 1], pages], np.int32)
  rows = replicate(mesh, (table_BP[0, :3].copy(), target_R))
  with jax.set_mesh(mesh):
    kv_cache = sampler.copy_pages(state.kv_cache, *rows)
  state = dataclasses.replace(state, kv_cache=kv_cache)
  _, chunk = decode(config, params, admit(state, prompts, 1.0, limits, mesh))
  np.testing.assert_array_equal(chunk.tokens_BC[3], expected.tokens_BC[3])
  np.testing.assert_array_equal(chunk.logp_BC[3], expected.logp_BC[3])


@LAYOUTS
def test_a_free_slot_writes_to_nobodys_page_alone(tiny, layout):
  """Slots that are done run along with the others; pages of a table that is not theirs stay."""
  config, params = tiny
  params = layout(config, params)
  state = start(config, params, PROMPTS, remaining=[CHUNK, 0, 0, 0])
  before = jax.device_get(state.kv_cache)
  table_BP = table_of()[0].copy()
  own = {int(page) for page in table_BP[0]}
  table_BP[1:] = kv.NOBODY
  mesh = one_device()
  rows = replicate(mesh, (table_BP, np.int32(1)))
  with jax.set_mesh(mesh):
    state, _ = sampler.decode(config, params, state, *rows, chunk=CHUNK, truncated_logp=False)
  for old, new in zip(*map(jax.tree.leaves, (before, state.kv_cache)), strict=True):
    changed = set(np.flatnonzero(np.any(old != np.asarray(new), (0, 2, 3, 4))).tolist())
    assert changed <= own | {kv.NOBODY}
    assert changed & own


def test_logits_that_are_not_finite_end_the_attempt_without_a_token(tiny_with):
  """A token whose embedding is nan is drawn, and reported; the step after it fails, alone."""
  config = tiny_with(tie_word_embeddings=False)
  params = qwen3.init_params(config, jax.random.key(0), jnp.float32)
  _, fine = run(config, as_sampler(config, params), PROMPTS)
  bad = int(fine.tokens_BC[2, 3])
  params["embed_tokens"] = params["embed_tokens"].at[bad].set(jnp.nan)
  state, chunk = run(config, as_sampler(config, params), PROMPTS)
  for b in range(SLOTS):
    tokens = fine.tokens_BC[b].tolist()
    n = tokens.index(bad) + 1 if bad in tokens[:-1] else CHUNK
    assert chunk.count_B[b] == n
    assert chunk.tokens_BC[b, :n].tolist() == tokens[:n]
    np.testing.assert_array_equal(chunk.logp_BC[b, :n], fine.logp_BC[b, :n])
    assert chunk.failed_B[b] == (n < CHUNK)
  assert chunk.failed_B[2] and not chunk.failed_B.all()
  assert chunk.ended_B.all()
  assert all(np.all(np.isfinite(cache.v_LPKSH)) for cache in state.kv_cache)


def test_the_state_is_donated(tiny):
  """The cache is updated in place: the state that went in is gone, at every call."""
  config, params = tiny
  mesh = one_device()
  state = create(config, params, mesh)
  filled = prefill(config, params, state, PROMPTS, mesh)
  assert state.kv_cache.k_LPKSH.is_deleted()
  admitted = admit(filled, PROMPTS, 1.0, CHUNK, mesh)
  assert filled.position_B.is_deleted()
  decode(config, params, admitted)
  assert admitted.kv_cache.k_LPKSH.is_deleted()
  assert admitted.position_B.is_deleted()


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 2, 2)])
def test_eight_devices_equal_one(tiny_with, shape):
  """A replica for each row of `tensor`, heads over it: the same tokens, log-probs to round-off, and
  each device its share of the pages."""
  config = tiny_with(num_heads=8, num_kv_heads=8)
  params = qwen3.init_params(config, jax.random.key(4), jnp.float32)
  _, one = run(config, as_sampler(config, params), PROMPTS)
  mesh = make_mesh(*shape)
  own, replicas = weights.sampler_params(config, params, mesh), replica_meshes(mesh)
  assert len(own) == len(replicas) == shape[0] * shape[1]
  state, many = run(config, own[-1], PROMPTS, mesh=replicas[-1])
  np.testing.assert_array_equal(many.tokens_BC, one.tokens_BC)
  np.testing.assert_allclose(many.logp_BC, one.logp_BC, atol=1e-5)
  for pages in jax.tree.leaves(state.kv_cache):
    assert pages.sharding.device_set == set(replicas[-1].devices.flat)
    assert pages.addressable_shards[0].data.size * shape[2] == pages.size


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
