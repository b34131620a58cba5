"""Sizes of the dense Qwen3 family by name, and the way to and from Hugging Face's config.json."""

from qed_jax.model.qwen3 import Qwen3Config

TINY_VOCAB = 64  # the tiny world's tokenizer is padded up to this


def _qwen3(layers, hidden, mlp, heads, kv_heads=8, tied=True, theta=1e6, positions=40_960):
  return {
    "vocab_size": 151_936,
    "hidden_size": hidden,
    "intermediate_size": mlp,
    "num_layers": layers,
    "num_heads": heads,
    "num_kv_heads": kv_heads,
    "head_dim": 128,
    "rope_theta": float(theta),
    "max_position": positions,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": tied,
  }


_2507 = {"theta": 5e6, "positions": 262_144}
PRESETS = {
  "qwen3-0.6b": _qwen3(28, 1024, 3072, 16),
  "qwen3-1.7b": _qwen3(28, 2048, 6144, 16),
  "qwen3-4b": _qwen3(36, 2560, 9728, 32),
  "qwen3-4b-thinking-2507": _qwen3(36, 2560, 9728, 32, **_2507),
  "qwen3-4b-instruct-2507": _qwen3(36, 2560, 9728, 32, **_2507),
  "qwen3-8b": _qwen3(36, 4096, 12_288, 32, tied=False),
  "qwen3-14b": _qwen3(40, 5120, 17_408, 40, tied=False),
  "qwen3-32b": _qwen3(64, 5120, 25_600, 64, tied=False),
  "tiny": {
    **_qwen3(3, 128, 384, 4, kv_heads=2, theta=1e4, positions=512),
    "vocab_size": TINY_VOCAB,
    "head_dim": 32,
  },
}


def from_preset(name: str, *, dtype: str, remat: str, attention: str) -> Qwen3Config:
  """Raises ValueError listing the names when `name` is not one."""
  if name not in PRESETS:
    raise ValueError(f"no model preset {name!r}: use one of {', '.join(PRESETS)}")
  return Qwen3Config(**PRESETS[name], dtype=dtype, remat=remat, attention=attention)


def from_hf(config: dict, *, dtype: str, remat: str, attention: str) -> Qwen3Config:
  """A parsed config.json -> Qwen3Config; rope_theta from either home that transformers gave it.

  Raises ValueError, one line, for another architecture, scaled rope, biases or a sliding window
  (such a model would load and be wrong), and for a field that is missing or impossible.
  """
  if config.get("model_type") != "qwen3":
    raise ValueError(
      f"config.json has model_type={config.get('model_type')!r}: need 'qwen3' (dense)"
    )
  # transformers' precedence: the old dictionary replaces the new one, the flat theta comes last.
  rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
  if not isinstance(rope, dict):
    raise ValueError(f"config.json has rope_parameters={rope!r}: need a dictionary")
  refused = {
    "rope type": (rope.get("rope_type", rope.get("type", "default")), "default"),
    "attention_bias": (bool(config.get("attention_bias")), False),
    "use_sliding_window": (bool(config.get("use_sliding_window")), False),
    "sliding layer_types": ("sliding" in str(config.get("layer_types")), False),
    "hidden_act": (config.get("hidden_act", "silu"), "silu"),
  }
  for field, (value, supported) in refused.items():
    if value != supported:
      raise ValueError(f"config.json has {field}={value!r}: only {supported!r} is supported")
  fields = {**config, "rope_theta": rope.get("rope_theta", config.get("rope_theta"))}
  heads, hidden = _size(fields, "num_attention_heads"), _size(fields, "hidden_size")
  fields["num_key_value_heads"] = fields.get("num_key_value_heads") or heads
  fields["head_dim"] = fields.get("head_dim") or hidden // heads
  kv_heads, head_dim = _size(fields, "num_key_value_heads"), _size(fields, "head_dim")
  if heads % kv_heads:
    raise ValueError(
      f"config.json has num_attention_heads={heads} and num_key_value_heads={kv_heads}: "
      "the second must divide the first"
    )
  if head_dim % 2:
    raise ValueError(f"config.json has head_dim={head_dim}: rotary positions need an even one")
  return Qwen3Config(
    vocab_size=_size(fields, "vocab_size"),
    hidden_size=hidden,
    intermediate_size=_size(fields, "intermediate_size"),
    num_layers=_size(fields, "num_hidden_layers"),
    num_heads=heads,
    num_kv_heads=kv_heads,
    head_dim=head_dim,
    rope_theta=_positive(fields, "rope_theta"),
    max_position=_size(fields, "max_position_embeddings"),
    rms_norm_eps=_positive(fields, "rms_norm_eps"),
    tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
    dtype=dtype,
    remat=remat,
    attention=attention,
  )


def _size(config: dict, field: str) -> int:
  value = _positive(config, field)
  if value != int(value):
    raise ValueError(f"config.json has {field}={config[field]!r}: need a whole number")
  return int(value)


def _positive(config: dict, field: str) -> float:
  value = config.get(field)
  if value is None:
    raise ValueError(f"config.json lacks {field}: it is not a complete Qwen3 config, add it")
  if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**53:
    raise ValueError(f"config.json has {field}={value!r}: need a number above 0")
  return float(value)


def to_hf(config: Qwen3Config, *, eos_ids, bos_id, pad_id, dtype: str) -> dict:
  """The config.json that transformers opens: rope_theta in both homes, for old and new readers.

  eos_ids: all the ids that end a text, the first of them the end of a turn; may be empty. bos_id,
  pad_id: may be None. dtype: of the weights on disk.
  """
  eos_ids = list(eos_ids)
  return {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": bos_id,
    "eos_token_id": eos_ids[0] if eos_ids else None,
    "pad_token_id": pad_id,
    "head_dim": config.head_dim,
    "hidden_act": "silu",
    "hidden_size": config.hidden_size,
    "initializer_range": 0.02,
    "intermediate_size": config.intermediate_size,
    "max_position_embeddings": config.max_position,
    "max_window_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_hidden_layers": config.num_layers,
    "num_key_value_heads": config.num_kv_heads,
    "rms_norm_eps": config.rms_norm_eps,
    "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
    "rope_theta": config.rope_theta,
    "rope_scaling": None,
    "sliding_window": None,
    "tie_word_embeddings": config.tie_word_embeddings,
    "torch_dtype": dtype,
    "dtype": dtype,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": config.vocab_size,
  }
