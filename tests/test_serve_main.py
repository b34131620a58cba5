"""The program itself: it serves a workdir, ends at a signal, and says mistakes in one line."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import openai
import pytest

from configs import serve as serve_config
from qed_jax import flags, serve
from qed_jax.checkpoint import Checkpoints
from qed_jax.data import tokenizer as tokenizer_lib
from qed_jax.rollout import policy

ROOT = Path(__file__).parents[1]
ASK = [{"role": "user", "content": "a b"}]
KEY = "sk-main-0123456789"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tiny):
  """A workdir as training leaves it, of a random tiny model."""
  model, params = tiny
  folder = tmp_path_factory.mktemp("runs") / "policy"
  tokenizer = tokenizer_lib.train_sentencepiece(
    ["a b c d : ="], tmp_path_factory.mktemp("words"), vocab_size=64, vocab_multiple=64
  )
  policy.save_description(folder / "model", model, tokenizer)
  checkpoints = Checkpoints(folder / "checkpoints", keep=1)
  checkpoints.save(1, {"params": params}, {})
  checkpoints.close()
  return folder


class Program:
  """python -m qed_jax.serve, its output read as it comes."""

  def __init__(self, *arguments, key=""):
    command = [sys.executable, "-m", "qed_jax.serve", "--config=configs/serve.py:tiny", *arguments]
    env = {k: v for k, v in os.environ.items() if not k.startswith("XLA_FLAGS")}
    env |= {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"), "JAX_PLATFORMS": "cpu"}
    self.process = subprocess.Popen(
      command, cwd=ROOT, env=env | ({"QED_JAX_API_KEY": key} if key else {}), text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    self.lines = []
    self.reader = threading.Thread(target=self.read, daemon=True)
    self.reader.start()

  def read(self):
    for line in self.process.stdout:
      self.lines.append(line.rstrip("\n"))

  def address(self):
    """Waits for the line that names it."""
    end = time.monotonic() + 120
    while time.monotonic() < end and self.process.poll() is None:
      for line in self.lines:
        if found := re.search(r"^serving \S+ at (http://\S+/v1) .*; chat page: \S+/$", line):
          return found[1]
      time.sleep(0.05)
    raise AssertionError(f"{self.lines} {self.end()}")

  def end(self, number=None):
    """(exit code, stderr), after a signal if one is given."""
    if number is not None:
      self.process.send_signal(number)
    try:
      _, _ = self.process.wait(30), self.reader.join(5)
    finally:
      self.process.kill()
    return self.process.returncode, self.process.stderr.read()


def test_a_workdir_is_served_until_a_signal(workdir):
  """With everything real: engine, tokenizer, key. What is in flight may end, nothing is said on
  stderr, and the exit is 0."""
  program = Program(f"--model={workdir}", "--port=0", key=KEY)
  url = program.address()
  assert KEY not in "".join(program.lines) and "key from QED_JAX_API_KEY" in program.lines[-1]
  client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60)
  assert client.models.list().data[0].id == "policy"
  options = {"model": "policy", "messages": ASK, "seed": 3, "n": 3, "max_tokens": 60}
  options |= {"logprobs": True, "top_logprobs": 2}
  whole = client.chat.completions.create(**options)
  assert whole.usage.completion_tokens > 0
  assert client.chat.completions.create(**options).choices == whole.choices
  stream = client.chat.completions.create(**options, stream=True)
  assert next(iter(stream)).choices[0].delta.role == "assistant"
  before = time.monotonic()
  program.process.send_signal(signal.SIGTERM)
  texts = {0: "", 1: "", 2: ""}
  for chunk in stream:
    choice = chunk.choices[0]
    texts[choice.index] += getattr(choice.delta, "reasoning_content", None) or ""
  assert texts == {c.index: c.message.reasoning_content for c in whole.choices}
  client.close()
  assert program.end() == (0, "") and time.monotonic() - before < 20
  assert program.lines[-1] == "the server has ended"


def test_what_goes_on_too_long_is_cut_at_the_end(workdir):
  """Ctrl-C; a client that never sends the rest of its request does not keep the program alive."""
  program = Program(f"--model={workdir}", "--port=0", "--config.limits.grace_s=1")
  host, port = program.address().removeprefix("http://").removesuffix("/v1").split(":")
  with socket.create_connection((host, int(port))) as held:
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
    held.sendall(f"{head}Content-Type: application/json\r\n\r\n{{".encode())
    time.sleep(0.3)
    before = time.monotonic()
    code, _ = program.end(signal.SIGINT)
    assert code == 0 and time.monotonic() - before < 15


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (["--model=x", "--config.limits.nn=3"], "nn"),
    (["--model=x", "--host=0.0.0.0"], "set a key in the environment variable QED_JAX_API_KEY"),
  ],
)
def test_a_mistake_is_one_line(arguments, said):
  code, stderr = Program(*arguments).end()
  assert code == 2 and said in stderr
  assert len(stderr.strip().splitlines()) == 1 and stderr.startswith("error: ")


@pytest.fixture
def config():
  found = serve_config.get_config("tiny")
  flags.check(found)
  return found


def test_an_address_that_is_taken_is_said_before_anything_is_loaded(workdir, config, monkeypatch):
  monkeypatch.setattr(policy, "load_params", None)
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    with pytest.raises(ValueError, match=f"--port={port} cannot be listened on"):
      serve.main(config, str(workdir), "127.0.0.1", port)
  with pytest.raises(ValueError, match="cannot be listened on"):
    serve.main(config, str(workdir), "127.0.0.1", 99_999)


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
  monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"serving needs fastapi.*\.\[serve\]"):
    serve.check_installed()


@pytest.mark.parametrize(
  ("model", "field", "value", "said"),
  [
    ("", "seed", 0, "--model is missing"),
    ("runs/no_such_run/x", "seed", 0, "--model is .* neither a workdir"),
    ("x", "api_key_env", KEY, "NAME of an environment variable"),
    ("x", "limits.choices", 4, "config.limits.choices is 4"),
    ("x", "limits.choices", 100, "config.limits.choices is 100"),
  ],
)
def test_what_cannot_be_served_is_said_at_once(config, model, field, value, said):
  config.update_from_flattened_dict({field: value})
  with pytest.raises(ValueError, match=said) as caught:
    serve.main(config, model, "127.0.0.1", 0)
  assert "\n" not in str(caught.value) and KEY not in str(caught.value)


def test_both_variants_are_good_configs():
  for variant in ("", "tiny"):
    found = serve_config.get_config(variant)
    flags.check(found)
    limits = found.limits
    assert limits.n <= limits.choices <= found.rollout.slots + limits.waiting
    assert limits.prompt_tokens < found.rollout.max_length >= limits.max_tokens
    assert json.dumps(found.to_dict())
  with pytest.raises(ValueError, match="use tiny"):
    serve_config.get_config("huge")
