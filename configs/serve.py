"""The server: a policy behind an OpenAI-compatible address.

  python -m qed_jax.serve --model=runs/cache_rl
  python -m qed_jax.serve --model=runs/demo/cache_rl --config=configs/serve.py:tiny --port=8001

Chats, completions, and a page to chat on. A key is read from the environment variable that
`api_key_env` names; without one the server keeps to 127.0.0.1. Sampling is QED-Nano's where a
request says nothing of it.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
  c = ConfigDict()
  c.seed = 0
  c.name = ""  # what clients call the model; "" takes the hub id or the folder's name
  c.model_revision = "main"
  c.api_key_env = "QED_JAX_API_KEY"  # the name of the variable, never the key
  c.model = ConfigDict({"dtype": "bfloat16", "remat": "none", "attention": "auto"})
  c.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1})
  c.rollout = ConfigDict(common.engine(slots=64, max_length=53_248))
  c.rollout.pages = 8_192  # 77 GB at 4B; 8,192 tokens a slot on average
  c.rollout.chunk = 16  # tokens between two looks at the queue, and in a piece of a stream
  c.rollout.keep_prefixes = True  # the parameters stay
  c.sampling = ConfigDict({
    "temperature": 0.8,
    "top_p": 0.95,
    "top_k": 20,
    "thinking": True,  # whether prompts open a think block
  })  # fmt: skip
  c.limits = ConfigDict({
    "waiting": 256,  # attempts that wait beside those in the slots; more are a 429
    "retry_after_s": 5,
    "n": 16,
    "choices": 64,  # of one request: prompts x n
    "max_tokens": 49_152,
    "prompt_tokens": 53_247,
    "logprobs": 20,
    "stops": 4,
    "stop_chars": 256,
    "stop_ids": 16,
    "logit_bias": 1_024,
    "body_bytes": 2_000_000,
    "body_s": 60.0,
    "deadline_s": 7_200.0,  # of a request, its wait in the queue included
    "step_s": 600.0,  # a longer step of the engine makes /health a 503
    "grace_s": 20.0,  # for what is in flight when the server is told to end
  })  # fmt: skip
  if variant == "tiny":
    c.model.dtype = "float32"
    c.rollout.update(common.tiny_engine() | {"slots": 8, "chunk": 4, "keep_prefixes": True})
    c.limits.update(waiting=64, max_tokens=127, prompt_tokens=127)
  elif variant:
    raise ValueError(f"configs/serve.py has no variant {variant!r}: use tiny")
  return c
