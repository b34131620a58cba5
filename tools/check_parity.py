"""Compare qed_jax with torch transformers on a Qwen3 folder, both in float32 on the CPU.

  python tools/check_parity.py HF_DIR

Tokens are random from a seed, so that no tokenizer is needed. Compared are the logits of
  rows of several lengths, from position 0;
  rows that start far out, up to the last position that config.json allows;
  rows whose positions are spread over 65,536, where a wrong rope_theta shows most;
  greedy decoding from prompts of several lengths, each side with its own KV cache;
  one long row, where the model is small enough for it to be quick.
Both sides are fed with torch's tokens. A greedy token may differ only where torch's two best
logits are closer than the difference measured. The limit is 2e-4. With very large weights float32
itself is coarser, so beside a case over the limit stands torch's own float32 error there, taken
against torch in float64. Prints a table, then one line of JSON: max_abs_diff is the largest
difference, over_limit names the cases above the limit. Exit status: 0; 1 over the limit or for a
wrong token; 2 for a folder that cannot be compared.
"""

import argparse
import copy
import functools
import json
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from qed_jax import sharding  # noqa: E402
from qed_jax.model import hf_weights, kv_cache, presets, qwen3  # noqa: E402

LIMIT = 2e-4
LENGTHS = (1, 17, 160)
WIDTH = 64  # tokens of a row at far positions
SPREAD = 65_536
STARTS = (4_096, 32_768, 40_896, 131_072)
PROMPTS = (1, 9, 30)
NEW_TOKENS = 24
LONG_ROW, LONG_ROW_HEADS, LONG_ROW_WIDTH = 33_280, 4, 64


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("folder", metavar="HF_DIR", help="config.json and safetensors of a Qwen3")
  parser.add_argument("--seed", type=int, default=0, help="of the random tokens (default 0)")
  args = parser.parse_args(argv)
  try:
    config, params, model = load(args.folder)
  except (ValueError, OSError) as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  rng = np.random.default_rng(args.seed)
  diffs, over_limit, greedy = {}, [], {}
  with torch.no_grad():
    for case, ours, theirs, in_float64 in comparisons(config, params, model, rng, greedy):
      diffs[case] = largest(ours, theirs)
      note = ""
      if not diffs[case] <= LIMIT:
        over_limit.append(case)
        note = f"  over the limit (torch's own float32 error: {largest(theirs, in_float64()):.2e})"
      print(f"{case:28} {diffs[case]:.2e}{note}", flush=True)
  worst = max(diffs, key=lambda case: np.nan_to_num(diffs[case], nan=np.inf))
  passed = not over_limit and greedy["tokens_wrong"] == 0
  figures = {
    "ok": passed,
    "max_abs_diff": finite(diffs[worst]),
    "worst": worst,
    "limit": LIMIT,
    "over_limit": over_limit,
    **greedy,
    "cases": {case: finite(diff) for case, diff in diffs.items()},
  }
  print(json.dumps(figures))
  return 0 if passed else 1


def comparisons(config, params, model, rng, greedy: dict):
  """Yields (case, our logits, torch's, a function for torch's in float64); counts greedy tokens."""
  for case, tokens_BT, positions_BT in rows(config, rng):
    run = functools.partial(their_logits, tokens_BT=tokens_BT, positions_BT=positions_BT)
    ours = our_logits(config, params, tokens_BT, positions_BT.astype(np.int32))
    yield case, ours, run(model), lambda run=run: run(doubled(model))
  yield greedy_decoding(config, params, model, rng, greedy)
  if is_small(config):
    tokens_BT = random_tokens(config, rng, 1, LONG_ROW)
    ours = our_last_logits(config, params, tokens_BT)
    run = functools.partial(their_last_logits, tokens_BT=tokens_BT)
    yield "one long row", ours, run(model), lambda: run(doubled(model))


def load(folder: str):
  """(config, params, torch model), both in float32."""
  described = hf_weights.read_config(folder)
  config = presets.from_hf(described, dtype="float32", remat="none", attention="xla")
  device = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
  layout = dict.fromkeys(qwen3.shapes(config), NamedSharding(device, PartitionSpec()))
  params = hf_weights.load(folder, config, qwen3.unflatten(layout), "float32")
  transformers.utils.logging.disable_progress_bar()
  transformers.utils.logging.set_verbosity_error()
  try:
    model = transformers.Qwen3ForCausalLM.from_pretrained(
      folder,
      config=transformers.Qwen3Config.from_dict(described),
      dtype=torch.float32,
      attn_implementation="eager",
      local_files_only=True,
    )
  except Exception as error:
    raise ValueError(f"transformers cannot open {folder}: {error}") from error
  return config, params, model.eval()


def rows(config, rng):
  """(name, tokens_BT, positions_BT) of every row to compare."""
  last = config.max_position
  for T in LENGTHS:
    if last >= T:
      yield f"length {T}", random_tokens(config, rng, 2, T), np.arange(T)[None].repeat(2, 0)
  T = min(WIDTH, last)
  for start in sorted({*(s for s in STARTS if s < last - T), last - T}):
    yield (
      f"from position {start}",
      random_tokens(config, rng, 2, T),
      start + np.arange(T)[None].repeat(2, 0),
    )
  reach = min(last, SPREAD)
  spread_BT = np.stack([np.sort(rng.choice(reach, T, replace=False)) for _ in range(2)])
  yield f"spread over {reach}", random_tokens(config, rng, 2, T), spread_BT


def random_tokens(config, rng, B: int, T: int):
  return rng.integers(0, config.vocab_size, (B, T)).astype(np.int32)


@jax.jit(static_argnums=0)
def our_logits(config, params, tokens_BT, positions_BT):
  x_BTD = qwen3.hidden(config, params, tokens_BT, positions_BT, jnp.ones_like(tokens_BT))
  return qwen3.logits(config, params, x_BTD)


def their_logits(model, tokens_BT, positions_BT):
  B, T = tokens_BT.shape
  # The mask is given whole: positions with gaps would be taken for packed rows.
  hidden_TT = torch.full((T, T), torch.finfo(model.dtype).min, dtype=model.dtype).triu(1)
  return model(
    input_ids=torch.tensor(tokens_BT, dtype=torch.long),
    position_ids=torch.tensor(positions_BT, dtype=torch.long),
    attention_mask=hidden_TT.expand(B, 1, T, T),
    use_cache=False,
  ).logits.numpy()


@functools.cache
def doubled(model):
  return copy.deepcopy(model).double()


def greedy_decoding(config, params, model, rng, greedy: dict):
  """Prompts of several lengths side by side in our cache; torch runs them one by one."""
  new = min(NEW_TOKENS, config.max_position - 1)
  prompts = [random_tokens(config, rng, 1, min(n, config.max_position - new)) for n in PROMPTS]
  tokens_PT, theirs_PTV = zip(
    *(their_greedy(model, prompt, new) for prompt in prompts), strict=True
  )
  lengths_P = np.array([p.shape[1] for p in prompts], np.int32)
  padded_PT = np.zeros((len(prompts), lengths_P.max()), np.int32)
  for row, prompt in zip(padded_PT, prompts, strict=True):
    row[: prompt.shape[1]] = prompt[0]
  length = int(lengths_P.max()) + new
  cache = kv_cache.create(config, len(prompts), length, "float32", by_layer=False)
  logits_PV, cache = our_prefill(config, params, cache, padded_PT, lengths_P)
  ours_PTV = np.zeros_like(theirs_PTV)
  for t in range(new):
    ours_PTV[:, t] = logits_PV
    token_P1 = np.array([tokens_T[t : t + 1] for tokens_T in tokens_PT], np.int32)
    logits_PV, cache = our_step(config, params, cache, token_P1, (lengths_P + t)[:, None])
  margin = 2 * largest(ours_PTV, theirs_PTV)
  equal, wrong = 0, 0
  for theirs_V, ours_V in zip(
    np.reshape(theirs_PTV, (-1, config.vocab_size)),
    ours_PTV.reshape(-1, config.vocab_size),
    strict=True,
  ):
    token, chosen = np.argmax(theirs_V), np.argmax(ours_V)
    equal += int(chosen == token)
    wrong += int(not theirs_V[token] - theirs_V[chosen] <= margin)
  greedy |= {"tokens": len(prompts) * new, "tokens_equal": equal, "tokens_wrong": wrong}

  def in_float64():
    exact = []
    for prompt, tokens_T in zip(prompts, tokens_PT, strict=True):
      row_BT = np.concatenate([prompt, np.array([tokens_T[:-1]], np.int32)], axis=1)
      positions_BT = np.arange(row_BT.shape[1])[None]
      exact.append(their_logits(doubled(model), row_BT, positions_BT)[0, -new:])
    return np.stack(exact)

  return "greedy decoding", ours_PTV, theirs_PTV, in_float64


def their_greedy(model, tokens_BT, new: int):
  """(tokens, the logits that chose them) of one prompt, with transformers' cache."""
  tokens, logits, cache = [], [], None
  inputs = torch.tensor(tokens_BT, dtype=torch.long)
  for _ in range(new):
    out = model(input_ids=inputs, past_key_values=cache, use_cache=True)
    cache = out.past_key_values
    logits.append(out.logits[0, -1].numpy())
    inputs = out.logits[:, -1:].argmax(-1)
    tokens.append(int(inputs))
  return tokens, np.stack(logits)


@jax.jit(static_argnums=0)
def our_prefill(config, params, cache, tokens_BT, lengths_B):
  """A page a prompt; what comes after a prompt is padding."""
  step_1T = jnp.arange(tokens_BT.shape[1])[None]
  positions_BT = jnp.where(step_1T < lengths_B[:, None], step_1T, -1)
  x_BTD, cache = qwen3.extend(config, params, tokens_BT, positions_BT, cache)
  last_BD = x_BTD[jnp.arange(len(tokens_BT)), lengths_B - 1]
  return qwen3.logits(config, params, last_BD), cache


@jax.jit(static_argnums=0)
def our_step(config, params, cache, tokens_BT, positions_BT):
  x_BTD, cache = qwen3.extend(config, params, tokens_BT, positions_BT, cache)
  return qwen3.logits(config, params, x_BTD[:, -1]), cache


def is_small(config) -> bool:
  """Whether the long row takes a minute at most: its time goes with the heads of all layers."""
  heads = config.num_layers * config.num_heads
  few = heads <= LONG_ROW_HEADS and config.head_dim <= LONG_ROW_WIDTH
  return few and config.max_position >= LONG_ROW


def their_last_logits(model, tokens_BT):
  model.set_attn_implementation("sdpa")  # eager would hold every head's [T, T]
  tokens_BT = torch.tensor(tokens_BT, dtype=torch.long)
  return model(input_ids=tokens_BT, use_cache=False, logits_to_keep=WIDTH).logits.numpy()


@jax.jit(static_argnums=0)
def our_last_logits(config, params, tokens_BT):
  positions_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
  x_BTD = qwen3.hidden(config, params, tokens_BT, positions_BT, jnp.ones_like(tokens_BT))
  return qwen3.logits(config, params, x_BTD[:, -WIDTH:])


def largest(ours, theirs) -> float:
  """Largest absolute difference; nan, which is over any limit, when either has one."""
  return float(np.max(np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64))))


def finite(diff: float) -> float | None:
  """JSON has no nan."""
  return diff if np.isfinite(diff) else None


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
