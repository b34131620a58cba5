"""Compare qed_jax.objectives.policy_gradient with recorded cases, in float64 on the CPU.

  python tools/check_policy_gradient.py FILE.json

FILE.json is a list of cases (or {"cases": [...]}, or one case). A case holds
  config              policy_loss "ppo" | "reinforce"; epsilon, or epsilon_low and epsilon_high;
                      batch_size, or group_normalization true with mean_group_tokens;
                      kl_coef (with clamp_log_ratio_ref_new), entropy_bonus, temperature;
                      overlong_filtering (with `overflow`, 1 where truncated)
  logits              [B][T][V]; the logits at t predict the token at t + 1
  input_ids, labels   [B][T]; labels are -100 where nothing is trained, on padding too
  position_ids        null: one sequence a row; [B][T]: packed, a sequence starts where it is 0
  advantages          one number a sequence (flat, or a list per row), or one a token [B][T]
  behavior_logprobs, reference_logprobs   [B][T]; the entry at t speaks of the token at t
  expected            loss, grad_logits [B][T][V]
mean_group_tokens (in config or in the case) and overflow are one number, or given as advantages
are. Other keys are ignored. Prints a table, then one line of JSON. The error of a gradient is
relative to the largest expected entry. Exit status: 0; 1 over the limit; 2 for a malformed file.
"""

import argparse
import functools
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np

from qed_jax.objectives import policy_gradient, rubric_rl
from qed_jax.records import Batch

LIMIT = 1e-6
# A loss that cancels to nothing and a gradient of zeros have no relative error of their own.
SMALLEST_SCALE = 1e-9


class MalformedFile(Exception):
  """What is wrong with the file, in one line."""


def take(mapping, key: str):
  if not isinstance(mapping, dict):
    raise MalformedFile(f"found {type(mapping).__name__} where an object with {key!r} should be")
  if mapping.get(key) is None:
    raise MalformedFile(f"{key!r} is missing")
  return mapping[key]


def number(mapping, key: str, absent: float | None = None) -> float:
  value = absent if absent is not None and mapping.get(key) is None else take(mapping, key)
  if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
    raise MalformedFile(f"{key!r} is {value!r}, not a finite number")
  return float(value)


def array(mapping, key: str, shape: tuple, read=True):
  """float64 of `shape` (None matches any length), finite where `read` and 0 elsewhere."""
  value = take(mapping, key)
  try:
    x = np.array(value, np.float64)
  except (TypeError, ValueError):
    raise MalformedFile(f"{key!r} is not a rectangular array of numbers") from None
  if x.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, x.shape, strict=True)):
    wanted = ["any" if n is None else n for n in shape]
    raise MalformedFile(f"{key!r} has shape {list(x.shape)}, wanted {wanted}")
  x = np.where(read, x, 0)
  if not np.all(np.isfinite(x)):
    raise MalformedFile(f"{key!r} holds something that is not a finite number")
  return x


def integers(mapping, key: str, shape: tuple):
  x = array(mapping, key, shape)
  if not np.all(x == np.round(x)):
    raise MalformedFile(f"{key!r} holds a number that is not an integer")
  return x.astype(np.int32)


def numberings(segments_BT, trained_BT):
  """The ways a file may count its sequences, as (sequence of each token or -1, count per row).

  All segments; all but the untrained ones at the end of a row, which are padding; the trained ones.
  """
  S = int(segments_BT.max())
  trained_BS = np.stack([(trained_BT & (segments_BT == s)).any(1) for s in range(S + 1)], axis=1)
  exists_BS = np.stack([(segments_BT == s).any(1) for s in range(S + 1)], axis=1)
  not_padding_BS = np.flip(np.maximum.accumulate(np.flip(trained_BS, 1), axis=1), 1)
  for counted_BS in (exists_BS, not_padding_BS & exists_BS, trained_BS):
    number_BS = np.where(counted_BS, np.cumsum(counted_BS).reshape(counted_BS.shape) - 1, -1)
    yield np.take_along_axis(number_BS, segments_BT, axis=1), counted_BS.sum(1).tolist()


def per_token(mapping, key: str, segments_BT, trained_BT):
  """One number, one a sequence (flat or per row) or one a token -> one a token."""
  value = take(mapping, key)
  if not isinstance(value, list):
    return np.full(segments_BT.shape, number(mapping, key))
  rows = value if all(isinstance(row, list) for row in value) else None
  if rows and [len(row) for row in rows] == [segments_BT.shape[1]] * len(segments_BT):
    return array(mapping, key, segments_BT.shape, trained_BT)
  flat = [x for row in rows for x in row] if rows else value
  for sequence_BT, counts in numberings(segments_BT, trained_BT) if flat else ():
    if (counts == [len(row) for row in rows]) if rows else (sum(counts) == len(flat)):
      value_R = array({key: flat}, key, (len(flat),))
      return np.asarray(rubric_rl.spread(value_R, sequence_BT))
  raise MalformedFile(
    f"{key!r} has {len(flat)} numbers for {int(segments_BT[:, -1].sum() + len(segments_BT))} "
    f"sequences in {len(segments_BT)} rows; give one a sequence or one a token"
  )


def read_case(case) -> dict:
  """One case of the file -> the arguments of `loss_of_logits`, and what is expected."""
  config = take(case, "config")
  policy_loss = take(config, "policy_loss")
  if policy_loss not in policy_gradient.POLICY_LOSSES:
    known = ", ".join(policy_gradient.POLICY_LOSSES)
    raise MalformedFile(f"'policy_loss' is {policy_loss!r}; known are {known}")
  logits_BTV = array(case, "logits", (None, None, None))
  B, T, V = logits_BTV.shape
  tokens_BT = integers(case, "input_ids", (B, T))
  if tokens_BT.size == 0 or tokens_BT.min() < 0 or tokens_BT.max() >= V:
    raise MalformedFile(f"'input_ids' leaves the vocabulary of {V} or is empty")
  trained_BT = integers(case, "labels", (B, T)) != -100
  trained_BT[:, 0] = False  # nothing predicts the first token of a row
  if case.get("position_ids") is None:
    positions_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
  else:
    positions_BT = integers(case, "position_ids", (B, T))
  starts_BT = (positions_BT == 0) & (np.arange(T) > 0)[None, :]
  segments_BT = np.cumsum(starts_BT, axis=1)

  if config.get("group_normalization"):
    holder = config if config.get("mean_group_tokens") is not None else case
    divisor_BT = per_token(holder, "mean_group_tokens", segments_BT, trained_BT)
  else:
    divisor_BT = np.full((B, T), number(config, "batch_size"))
  if not np.all(divisor_BT[trained_BT] > 0):
    raise MalformedFile("'batch_size' or 'mean_group_tokens' is not positive")
  weight_BT = np.where(trained_BT, 1 / np.where(trained_BT, divisor_BT, 1), 0)
  if config.get("overlong_filtering"):
    weight_BT *= 1 - per_token(case, "overflow", segments_BT, trained_BT)

  kl_coef = number(config, "kl_coef", absent=0.0)
  behavior_BT = array(case, "behavior_logprobs", (B, T), trained_BT)
  if kl_coef == 0 and case.get("reference_logprobs") is None:
    reference_BT = behavior_BT
  else:
    reference_BT = array(case, "reference_logprobs", (B, T), trained_BT)
  temperature = number(config, "temperature", absent=1.0)
  if temperature <= 0:
    raise MalformedFile(f"'temperature' is {temperature}, not positive")
  batch = Batch(
    tokens_BT=tokens_BT,
    positions_BT=positions_BT,
    segments_BT=segments_BT + 1,
    weight_BT=weight_BT,
    advantage_BT=per_token(case, "advantages", segments_BT, trained_BT),
    behavior_logp_BT=behavior_BT,
    reference_logp_BT=reference_BT,
  )
  both = "epsilon" if config.get("epsilon") is not None else None
  options = {
    "policy_loss": policy_loss,
    "eps_low": number(config, both or "epsilon_low"),
    "eps_high": number(config, both or "epsilon_high"),
    "kl_coef": kl_coef,
    "entropy_coef": number(config, "entropy_bonus", absent=0.0),
    "clamp_log_ratio": number(
      config, "clamp_log_ratio_ref_new", absent=1.0 if kl_coef == 0 else None
    ),
  }
  expected = take(case, "expected")
  return {
    "inputs": (logits_BTV, batch, temperature, options),
    "loss": number(expected, "loss"),
    "gradient": array(expected, "grad_logits", (B, T, V)),
    "name": f"{policy_loss:<9}  {B} x {T} x {V}, {segments_BT.max() + 1} a row",
  }


def loss_of_logits(logits_BTV, batch, temperature, policy_loss, **coefficients):
  """Our loss as a function of the logits: scored as `score` does, the target at t + 1."""
  logp_BTV = jax.nn.log_softmax(logits_BTV / temperature)
  entropy_BT = -jnp.sum(jnp.exp(logp_BTV) * logp_BTV, axis=-1)
  next_BT1 = jnp.roll(batch.tokens_BT, -1, axis=1)[..., None]
  logp_BT = jnp.take_along_axis(logp_BTV, next_BT1, axis=-1)[..., 0]
  logp_BT, entropy_BT = (jnp.pad(x_BT, ((0, 0), (1, 0)))[:, :-1] for x_BT in (logp_BT, entropy_BT))
  return policy_gradient.loss(logp_BT, entropy_BT, batch, policy_loss=policy_loss, **coefficients)[
    0
  ]


@functools.partial(jax.jit, static_argnames="policy_loss")
def loss_and_gradient(logits_BTV, batch, temperature, **options):
  return jax.value_and_grad(loss_of_logits)(logits_BTV, batch, temperature, **options)


def errors(case: dict) -> tuple[float, float]:
  """A case that was read -> (relative error of the loss, of the gradient)."""
  logits_BTV, batch, temperature, options = case["inputs"]
  loss, gradient_BTV = loss_and_gradient(logits_BTV, batch, temperature, **options)
  loss_scale = max(abs(case["loss"]), SMALLEST_SCALE)
  gradient_scale = max(np.abs(case["gradient"]).max(), SMALLEST_SCALE)
  gradient_error = np.abs(np.asarray(gradient_BTV) - case["gradient"]).max()
  return abs(float(loss) - case["loss"]) / loss_scale, float(gradient_error / gradient_scale)


def read_file(path: str) -> list[dict]:
  try:
    with open(path, encoding="utf-8") as file:
      content = json.load(file)
  except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
    raise MalformedFile(str(error)) from None
  if isinstance(content, dict):
    content = content.get("cases", [content])
  if not isinstance(content, list) or not content:
    raise MalformedFile("holds no cases")
  cases = []
  for i, case in enumerate(content):
    try:
      cases.append(read_case(case))
    except MalformedFile as error:
      raise MalformedFile(f"case {i}: {error}") from None
  return cases


def main(arguments=None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("file", help="cases, as JSON")
  path = parser.parse_args(arguments).file
  with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
    try:
      cases = read_file(path)
    except MalformedFile as error:
      print(f"check_policy_gradient: {path}: {error}", file=sys.stderr)
      return 2
    print("case  loss error  gradient error  what")
    worst_loss = worst_gradient = 0.0
    failed = 0
    for i, case in enumerate(cases):
      loss_error, gradient_error = errors(case)
      ok = loss_error <= LIMIT and gradient_error <= LIMIT  # False for NaN
      failed += not ok
      worst_loss = float(np.maximum(worst_loss, loss_error))
      worst_gradient = float(np.maximum(worst_gradient, gradient_error))
      verdict = "" if ok else "  OVER THE LIMIT"
      print(f"{i:4}  {loss_error:10.1e}  {gradient_error:14.1e}  {case['name']}{verdict}")
  figures = {
    "cases": len(cases),
    "failed": failed,
    "max_loss_error": worst_loss if math.isfinite(worst_loss) else None,
    "max_gradient_error": worst_gradient if math.isfinite(worst_gradient) else None,
    "limit": LIMIT,
  }
  print(json.dumps(figures))
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())
