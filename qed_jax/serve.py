"""The server: python -m qed_jax.serve --model=runs/cache_rl

An OpenAI-compatible address for a policy, and a page to chat on. `--model` is a workdir of this
program, a Hugging Face folder or a hub id; everything else is in configs/serve.py. It listens on
127.0.0.1 unless `--host` says otherwise, which needs a key in the environment. SIGTERM and Ctrl-C
let what is in flight end for a while.
"""

import importlib.util
import signal
import socket
import sys
from pathlib import Path

from absl import flags as absl_flags

from qed_jax import flags, sharding
from qed_jax.data import tokenizer as tokenizers
from qed_jax.rollout import jobs, policy

CONFIG = "configs/serve.py"
KEEP_ALIVE_S = 75  # idle connections; longer than clients keep theirs, so that none is cut in use


def main(config, model: str, host: str, port: int) -> None:
  check_installed()
  from qed_jax.serving import access, generation
  from qed_jax.serving.app import create_app

  # --- What can be wrong is found before anything is loaded ------------------------------------
  if not model:
    raise ValueError("--model is missing: name a workdir, a Hugging Face folder or a hub id")
  key = access.read_key(config.api_key_env)
  access.check_address(host, key, config.api_key_env)
  generation.check_limits(config.limits, config.rollout.slots)
  start = policy.locate(model, config.model_revision, "--model")
  sizes = policy.sizes(start, config.model)
  tokenizer = tokenizers.load(start.folder)
  policy.check_vocabulary(sizes, tokenizer)
  listener = listen(host, port)

  # --- The engine --------------------------------------------------------------------------------
  mesh = sharding.make_mesh(**config.mesh.to_dict())
  engine = jobs.make_engine(sizes, mesh, config.rollout, tokenizer)
  abstract = policy.abstract_params(sizes, mesh, config.model.dtype)
  engine.set_params(policy.load_params(start, sizes, abstract, config.seed), 0)
  print(f"{model}: compiling", flush=True)
  engine.warm_up()

  # --- The server --------------------------------------------------------------------------------
  name = config.name or (model if start.revision else Path(model).resolve().name)
  service = generation.service(name, engine, tokenizer, config)
  app = create_app(service, key=key)
  run(app, listener, config.limits.grace_s, banner(name, listener, key, config.api_key_env))
  print("the server has ended", flush=True)


def check_installed() -> None:
  """Raises ValueError, one line, when the extra is missing."""
  missing = [
    name
    for name in ("fastapi", "uvicorn", "prometheus_client")
    if not importlib.util.find_spec(name)
  ]
  if missing:
    raise ValueError(f"serving needs {', '.join(missing)}: pip install --editable '.[serve]'")


def listen(host: str, port: int) -> socket.socket:
  """A socket bound to the address; it takes connections once the server runs."""
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  listener = socket.socket(family, socket.SOCK_STREAM)
  listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    listener.bind((host.strip("[]"), port))
  except (OSError, OverflowError) as error:
    listener.close()
    raise ValueError(f"--host={host} --port={port} cannot be listened on ({error})") from None
  return listener


def banner(name: str, listener: socket.socket, key: str, variable: str) -> str:
  """The line that says where the server is."""
  host, port = listener.getsockname()[:2]
  address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
  who = f"key from {variable}" if key else "no key, this machine only"
  return f"serving {name} at {address}/v1 ({who}); chat page: {address}/"


def run(app, listener: socket.socket, grace: float, line: str) -> None:
  """Serves until SIGTERM or Ctrl-C; then what is in flight has `grace` seconds."""
  import uvicorn

  class Server(uvicorn.Server):
    async def startup(self, sockets=None) -> None:
      await super().startup(sockets=sockets)
      print(line, flush=True)

  # uvicorn raises the signal again when it is done; to end in order is no failure.
  signal.signal(signal.SIGTERM, lambda *_: None)
  settings = uvicorn.Config(
    app,
    log_level="warning",
    access_log=False,  # addresses and paths are nobody's business, and /metrics counts
    server_header=False,
    timeout_keep_alive=KEEP_ALIVE_S,
    timeout_graceful_shutdown=int(grace),
  )
  try:
    Server(settings).run(sockets=[listener])
  except KeyboardInterrupt:
    pass


def parse() -> None:
  """Flags beside those of every program: --model, --host, --port, and a config by default."""
  absl_flags.DEFINE_string("model", "", "workdir, Hugging Face folder or hub id")
  absl_flags.DEFINE_string("host", "127.0.0.1", "address to listen on; others need a key")
  absl_flags.DEFINE_integer("port", 8000, "port to listen on; 0 takes a free one")
  if not any(word.lstrip("-").split("=")[0] == "config" for word in sys.argv[1:]):
    sys.argv.insert(1, f"--config={Path(__file__).parents[1] / CONFIG}")
  values = absl_flags.FLAGS
  flags.run(
    lambda config, _: main(config, values.model, values.host, values.port), needs_workdir=False
  )


if __name__ == "__main__":
  parse()
