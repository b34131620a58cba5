"""What the engine is asked for: the attempts of a request."""

import re
import secrets
from collections.abc import Sequence

from qed_jax.rollout.requests import Request
from qed_jax.serving.errors import ApiError
from qed_jax.serving.protocol import Body, ChatBody

GREEDY_BELOW = 1e-4  # logits divided by less could overflow float32
SMALLEST_TOP_P = 1e-6  # for the same reason; the best token alone is left long before


def biases(body: Body, vocabulary: int) -> tuple[tuple[int, float], ...]:
  """logit_bias with its keys as ids."""
  found = []
  for key, bias in (body.logit_bias or {}).items():
    if not re.fullmatch(r"[0-9]{1,10}", key) or int(key) >= vocabulary:
      raise ApiError(
        400, f"logit_bias: {key[:20]!r} is no token id below {vocabulary}", "logit_bias"
      )
    found.append((int(key), bias))
  return tuple(found)


def attempts(
  body: Body, prompts: Sequence[Sequence[int]], engine, limits, defaults
) -> list[Request]:
  """What the engine is asked for: choice i of a prompt is attempt i under the request's seed.

  engine: its vocab_size and max_length are read. defaults: temperature, top_p and top_k where the
  request says nothing. Raises ApiError for what the vocabulary or the context cannot hold.
  """
  for token in body.stop_token_ids or ():
    if token >= engine.vocab_size:
      message = f"stop_token_ids: {token} is no token id below {engine.vocab_size}"
      raise ApiError(400, message, "stop_token_ids")
  given = lambda value, default: default if value is None else value  # noqa: E731
  temperature = given(body.temperature, defaults.temperature)
  seed = secrets.randbits(32) if body.seed is None else body.seed % 2**32
  sampling = {
    "seed": seed,
    "temperature": temperature if temperature >= GREEDY_BELOW else 0.0,
    "top_p": max(given(body.top_p, defaults.top_p), SMALLEST_TOP_P),
    "top_k": max(given(body.top_k, defaults.top_k), 0),
    "min_p": given(body.min_p, 0.0),
    "repetition_penalty": given(body.repetition_penalty, 1.0),
    "presence_penalty": given(body.presence_penalty, 0.0),
    "frequency_penalty": given(body.frequency_penalty, 0.0),
    "logit_bias": biases(body, engine.vocab_size),
    "stop_ids": tuple(body.stop_token_ids or ()),
    "top_logprobs": body.alternatives or 0,
  }
  return [
    Request(
      prompt_tokens=tuple(prompt),
      attempt=i,
      max_tokens=room(body, prompt, engine, limits),
      **sampling,
    )
    for prompt in prompts
    for i in range(body.choices)
  ]


def room(body: Body, prompt: Sequence[int], engine, limits) -> int:
  """Most new tokens after a prompt. Raises ApiError when it and they are too long together."""
  param = "messages" if isinstance(body, ChatBody) else "prompt"
  longest = min(limits.prompt_tokens, engine.max_length - 1)
  code = "context_length_exceeded"
  if not prompt:
    raise ApiError(400, f"{param}: there is no token in it", param)
  if len(prompt) > longest:
    raise ApiError(400, f"{param}: {len(prompt)} tokens, the most are {longest}", param, code)
  left = engine.max_length - len(prompt)
  if body.tokens_asked is None:
    return min(left, limits.max_tokens)
  if body.tokens_asked > left:
    asked = f"{len(prompt)} tokens of {param} and {body.tokens_asked} new ones"
    raise ApiError(400, f"{asked}: the context has {engine.max_length}", "max_tokens", code)
  return body.tokens_asked
