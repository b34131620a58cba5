"""What is wrong with a request is said in OpenAI's shape; the official client knows its class."""

import openai
import pytest
import scripted_server
from scripted_server import is_error, says
from test_serve import chat, client, complete
from test_tokenizer import write_bpe_folder

from qed_jax.data import tokenizer as tokenizer_lib


@pytest.fixture(scope="module")
def url(tmp_path_factory):
  tokenizer = tokenizer_lib.load(write_bpe_folder(tmp_path_factory.mktemp("bpe")))
  app, _, engine = scripted_server.make(tokenizer, script=says(tokenizer, "abc"))
  with scripted_server.listening(app) as found:
    yield found
  assert engine.submitted == 0


BAD = [
  ({"temperature": -0.1}, "temperature"),
  ({"temperature": 2.5}, "temperature"),
  ({"temperature": "warm"}, "temperature"),
  ({"top_p": 0}, "top_p"),
  ({"n": 0}, "n"),
  ({"n": 17}, "n"),
  ({"n": True}, "n"),
  ({"max_tokens": 0}, "max_tokens"),
  ({"max_tokens": 401}, "max_tokens"),
  ({"max_completion_tokens": -1}, "max_completion_tokens"),
  ({"max_completion_tokens": 401}, "max_completion_tokens"),
  ({"stop": ["a"] * 5}, "stop"),
  ({"stop": ""}, "stop"),
  ({"stop": "x" * 300}, "stop"),
  ({"seed": 2**63}, "seed"),
  ({"seed": 1.5}, "seed"),
  ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
  ({"top_logprobs": 2}, "top_logprobs"),
  ({"logit_bias": {"x": 1}}, "logit_bias"),
  ({"logit_bias": {"99999999": 1}}, "logit_bias"),
  ({"logit_bias": {"1": 101}}, "logit_bias"),
  ({"presence_penalty": 3}, "presence_penalty"),
  ({"messages": []}, "messages"),
  ({"messages": [{"role": "tool", "content": "a"}]}, "messages"),
  ({"messages": [{"role": "user", "content": None}]}, "messages"),
  ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
  ({"messages": [{"role": "user", "content": "a " * 500}]}, "messages"),
  ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
  ({"response_format": {"type": "json_object"}}, "response_format"),
  ({"extra_body": {"top_k": -2}}, "top_k"),
  ({"extra_body": {"min_p": 1.1}}, "min_p"),
  ({"extra_body": {"repetition_penalty": 0}}, "repetition_penalty"),
  ({"extra_body": {"stop_token_ids": [-1]}}, "stop_token_ids"),
  ({"extra_body": {"stop_token_ids": [10_000]}}, "stop_token_ids"),
  ({"extra_body": {"chat_template_kwargs": {"enable_thinking": 1}}}, "chat_template_kwargs"),
]


@pytest.mark.parametrize(("options", "param"), BAD)
def test_a_bad_request_names_the_field(url, options, param):
  for stream in (False, True):
    with pytest.raises(openai.BadRequestError) as caught:
      chat(url, stream=stream, **options)
    assert caught.value.param == param and caught.value.type == "invalid_request_error"
    assert is_error(400, caught.value.response.content)


def test_a_context_that_is_too_short_has_its_code(url):
  for options in ({"messages": [{"role": "user", "content": "a " * 500}]}, {"max_tokens": 400}):
    longer = [{"role": "user", "content": "a " * 100}]
    with pytest.raises(openai.BadRequestError) as caught:
      chat(url, **({"messages": longer} | options))
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
  "options",
  [{"prompt": ""}, {"prompt": []}, {"prompt": [[]]}, {"prompt": [1, "a"]}, {"prompt": [10_000]},
   {"prompt": [2**80]}, {"prompt": {}}, {"prompt": ["a"] * 65}, {"echo": True}, {"suffix": "a"},
   {"best_of": 3}, {"logprobs": 21}],
)  # fmt: skip
def test_a_bad_completion_is_refused(url, options):
  with pytest.raises(openai.BadRequestError) as caught:
    complete(url, **options)
  assert is_error(400, caught.value.response.content)


def test_other_mistakes_have_their_classes(url):
  """404 for a model or route that is not there, 405 for a method; both in OpenAI's shape."""
  with pytest.raises(openai.NotFoundError) as caught:
    chat(url, model="gpt")
  assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
  with pytest.raises(openai.NotFoundError) as caught:
    client(url).embeddings.create(model="tiny", input="a")
  assert is_error(404, caught.value.response.content)
  with pytest.raises(openai.APIStatusError) as caught:
    client(url).get("/chat/completions", cast_to=object)
  assert caught.value.status_code == 405 and is_error(405, caught.value.response.content)
  assert caught.value.response.headers["allow"] == "POST"
