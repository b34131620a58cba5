"""What a request may say: bodies as pydantic reads them.

Bodies go from bytes through pydantic's own JSON parser, which refuses bad UTF-8, lone surrogates
and deep nesting, and with strict types: "1" is no number and true no integer. Unknown fields are
ignored, since clients send extras; known ones that this server would have to disregard are refused.
"""

from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import AfterValidator, ConfigDict, FailFast, Field

from qed_jax.serving.errors import ApiError

LONGEST_LIST = 10_000  # where a list is not limited by the config, or before it is
COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions; chats may fill the context


def unless(*supported: Any) -> AfterValidator:
  """Refuses every other value of a field whose meaning this server lacks."""

  def check(value: Any) -> Any:
    if value is not None and value not in supported:
      raise ValueError("this server does not support it")
    return value

  return AfterValidator(check)


ONE_OF = {
  "prompt": "give a string, a list of strings, token ids or a list of those",
  "stop": "give a string or a list of strings",
}


class FirstOnly(FailFast):
  """One error of a list is enough: a body can hold a million. Unions want their types hashable."""

  __hash__ = object.__hash__


Positive = Annotated[int, Field(ge=1, lt=2**31)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], FirstOnly()]


class Strict(pydantic.BaseModel):
  """JSON types as they stand, finite numbers; null is the same as absent."""

  model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(Strict):
  """include_usage: a last chunk holds the usage."""

  include_usage: bool | None = None


class Body(Strict):
  """What both endpoints have in common."""

  model: str | None = None
  max_tokens: Positive | None = None
  temperature: Annotated[float, Field(ge=0, le=2)] | None = None
  top_p: Annotated[float, Field(gt=0, le=1)] | None = None
  top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
  min_p: Annotated[float, Field(ge=0, le=1)] | None = None
  repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
  presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
  frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
  logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
  seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
  n: Positive | None = None
  stop: str | Annotated[list[str], FirstOnly(), Field(max_length=LONGEST_LIST)] | None = None
  stop_token_ids: Tokens | None = None
  stream: bool | None = None
  stream_options: StreamOptions | None = None

  @property
  def choices(self) -> int:
    """Attempts at each prompt."""
    return self.n or 1

  @property
  def stops(self) -> tuple[str, ...]:
    """Stop strings."""
    return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

  @property
  def usage_at_end(self) -> bool:
    """Whether a stream ends with its usage."""
    return bool(self.stream_options and self.stream_options.include_usage)


class Part(Strict):
  """A piece of a message's content."""

  type: Literal["text"]
  text: str


class Message(Strict):
  """A turn. "developer" is OpenAI's newer word for "system"."""

  role: Literal["system", "developer", "user", "assistant"]
  content: str | Annotated[list[Part], FirstOnly(), Field(max_length=LONGEST_LIST)]


class ChatTemplate(Strict):
  """What of the template a request may choose."""

  enable_thinking: bool | None = None


class ChatBody(Body):
  """POST /v1/chat/completions."""

  messages: Annotated[list[Message], FirstOnly(), Field(min_length=1, max_length=LONGEST_LIST)]
  max_completion_tokens: Positive | None = None
  logprobs: bool | None = None
  top_logprobs: Annotated[int, Field(ge=0, lt=2**31)] | None = None
  chat_template_kwargs: ChatTemplate | None = None
  tools: Annotated[Any, unless([])] = None
  functions: Annotated[Any, unless([])] = None
  response_format: Annotated[Any, unless({"type": "text"})] = None

  @property
  def turns(self) -> list[dict[str, str]]:
    """The messages as the tokenizer takes them."""
    return [
      {
        "role": "system" if m.role == "developer" else m.role,
        "content": m.content
        if isinstance(m.content, str)
        else "\n".join(p.text for p in m.content),
      }
      for m in self.messages
    ]

  def thinking(self, default: bool) -> bool:
    """Whether the prompt opens a think block."""
    chosen = self.chat_template_kwargs and self.chat_template_kwargs.enable_thinking
    return default if chosen is None else chosen

  @property
  def tokens_asked(self) -> int | None:
    """Most new tokens; None for as many as there is room for."""
    return self.max_completion_tokens or self.max_tokens

  @property
  def alternatives(self) -> int | None:
    """Tokens to name beside each sampled one; None when no log-probabilities are wanted."""
    return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(Body):
  """POST /v1/completions."""

  prompt: (
    str
    | Annotated[list[str], FirstOnly(), Field(min_length=1, max_length=LONGEST_LIST)]
    | Tokens
    | Annotated[list[Tokens], FirstOnly(), Field(min_length=1, max_length=LONGEST_LIST)]
  )
  logprobs: Annotated[int, Field(ge=0, lt=2**31)] | None = None
  echo: Annotated[Any, unless(False)] = None
  suffix: Annotated[Any, unless("")] = None
  best_of: Positive | None = None

  @property
  def prompts(self) -> list[str] | list[list[int]]:
    """One or more, each a text or token ids."""
    one = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
    return [self.prompt] if one or not self.prompt else self.prompt

  @property
  def tokens_asked(self) -> int:
    """Most new tokens."""
    return self.max_tokens or COMPLETION_TOKENS

  @property
  def alternatives(self) -> int | None:
    """Tokens to name beside each sampled one; None when no log-probabilities are wanted."""
    return self.logprobs


Kind = TypeVar("Kind", bound=Body)


def read(kind: type[Kind], data: bytes, limits) -> Kind:
  """The body of a request. Raises ApiError, one line, on the first thing that is wrong with it."""
  try:
    body = kind.model_validate_json(data)
  except pydantic.ValidationError as error:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    if not first["loc"]:
      raise ApiError(400, f"the body: {first['msg']}") from None
    param, *rest = first["loc"]
    # Pydantic names the members of a union, of which it tells what the first one lacks.
    where = ".".join(str(x) for x in (param, *rest) if x != "str" and "[" not in str(x))
    what = ONE_OF.get(param, first["msg"]) if rest else first["msg"]
    message = f"{where}: {what.removeprefix('Value error, ')}"
    raise ApiError(400, message, str(param)) from None
  check(body, limits)
  return body


def check(body: Body, limits) -> None:
  """Raises ApiError where a value is over a limit of the config."""

  def at_most(param: str, value: int | None, limit: int, what: str = "the limit") -> None:
    if value is not None and value > limit:
      raise ApiError(400, f"{param} is {value}: {what} is {limit}", param)

  at_most("n", body.n, limits.n)
  at_most("stop", len(body.stops), limits.stops, "the most strings")
  at_most("stop", max(map(len, body.stops), default=0), limits.stop_chars, "the longest string")
  if "" in body.stops:
    raise ApiError(400, "stop: an empty string would stop at once", "stop")
  at_most("stop_token_ids", len(body.stop_token_ids or ()), limits.stop_ids, "the most ids")
  at_most("logit_bias", len(body.logit_bias or ()), limits.logit_bias, "the most tokens")
  at_most("max_tokens", body.max_tokens, limits.max_tokens)
  if isinstance(body, ChatBody):
    at_most("max_completion_tokens", body.max_completion_tokens, limits.max_tokens)
    at_most("top_logprobs", body.top_logprobs, limits.logprobs)
    if body.top_logprobs and not body.logprobs:
      raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
  if isinstance(body, CompletionBody):
    at_most("logprobs", body.logprobs, limits.logprobs)
    at_most("prompt", len(body.prompts) * body.choices, limits.choices, "prompts x n: the most")
    if body.best_of not in (None, body.choices):
      raise ApiError(400, "best_of: this server does not support it", "best_of")
