"""Qwen3 in Flax NNX: one table of dimensions, layers stacked and scanned, HF's arithmetic.

Parameters are a nested dict whose paths and memory order are Hugging Face's: projections [out, in],
split by head and stacked by layer. `DIMS` says it all and is read by the initialiser, by the
shardings and by convert.py. Training and decoding run the same blocks and differ in the `attend`
function they pass in.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from qed_jax.model.attention import RESIDUALS, append_and_attend, attention, pack
from qed_jax.model.head import score_tokens
from qed_jax.model.layers import (
  Adapted,
  at_least_float32,
  linear,
  matrix,
  rms_norm,
  rope,
  rope_angles,
)
from qed_jax.sharding import constrain, gathered, several_devices

DIMS = {
  "embed_tokens": "VD",
  "layers.input_layernorm": "LD",
  "layers.self_attn.q_proj": "LNHD",
  "layers.self_attn.k_proj": "LKHD",
  "layers.self_attn.v_proj": "LKHD",
  "layers.self_attn.o_proj": "LDNH",
  "layers.self_attn.q_norm": "LH",
  "layers.self_attn.k_norm": "LH",
  "layers.post_attention_layernorm": "LD",
  "layers.mlp.gate_proj": "LFD",
  "layers.mlp.up_proj": "LFD",
  "layers.mlp.down_proj": "LDF",
  "norm": "D",
  "lm_head": "VD",
}


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
  """Sizes under Hugging Face's names, and three choices of how to compute.

  dtype: of activations and matrix products; norms, rope, softmax and logits are float32.
  remat: what the backward pass keeps of a layer, a name of REMAT. attention: an implementation of
    qed_kernels.flash_attention, or "auto".
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float
  max_position: int
  rms_norm_eps: float
  tie_word_embeddings: bool
  dtype: str
  remat: str
  attention: str


def shapes(config: Qwen3Config) -> dict[str, tuple[int, ...]]:
  """Path -> shape, for every parameter that this model has."""
  size = {
    "V": config.vocab_size,
    "D": config.hidden_size,
    "F": config.intermediate_size,
    "L": config.num_layers,
    "N": config.num_heads,
    "K": config.num_kv_heads,
    "H": config.head_dim,
  }
  paths = [p for p in DIMS if p != "lm_head" or not config.tie_word_embeddings]
  return {path: tuple(size[d] for d in DIMS[path]) for path in paths}


def is_adapted(leaf) -> bool:
  return isinstance(leaf, Adapted)


def flatten(params: dict) -> dict:
  """Nested dict -> {"layers.mlp.up_proj": leaf}; an Adapted is a leaf."""
  leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_adapted)
  return {".".join(p.key for p in path): x for path, x in leaves}


def unflatten(leaves: dict) -> dict:
  """The inverse of `flatten`."""
  tree: dict = {}
  for path, leaf in leaves.items():
    *parents, name = path.split(".")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return tree


def _param(config: Qwen3Config, rngs: nnx.Rngs, path: str) -> nnx.Param:
  """Norm scales are ones; projections normal / sqrt(inputs); embedding and head normal * 0.1.

  The projections that write to the residual stream are ten times smaller, so that a token's own
  embedding dominates at first: the tiny world's look-ups are learned in half the steps.
  """
  shape, key = shapes(config)[path], rngs.params()
  if path.endswith("norm"):
    return nnx.Param(jnp.ones(shape, jnp.float32))
  if path in ("embed_tokens", "lm_head"):
    scale = 0.1
  else:
    inputs = {"D": config.hidden_size, "H": config.num_heads * config.head_dim}
    scale = inputs.get(DIMS[path][-1], config.intermediate_size) ** -0.5
    if path.endswith(("o_proj", "down_proj")):
      scale *= 0.1
  return nnx.Param(scale * jax.random.normal(key, shape, jnp.float32))


def to_heads(x_BTD, w_NHD, head_dim: int):
  """x w by head: [B, T, N, H]."""
  return linear(x_BTD, matrix(w_NHD, 2)).reshape(*x_BTD.shape[:2], -1, head_dim)


def from_heads(o_BTNH, w_DNH):
  """The heads' outputs to the width: [B, T, D]."""
  B, T, N, H = o_BTNH.shape
  return linear(o_BTNH.reshape(B, T, N * H), matrix(w_DNH, 1))


def adapter_letters(letters: str) -> tuple[str, str]:
  """Letters of a weight -> those of the a and b that change it; R is the rank.

  "LNHD" -> "LRD", "LNHR"; "LDF" -> "LRF", "LDR". Weights that make the width have D in front.
  """
  outputs = "D" if letters[1] == "D" else letters[1:-1]
  return "LR" + letters[1 + len(outputs) :], "L" + outputs + "R"


def gather(weights, dtype: str):
  """The state of a Block with its projections as they are multiplied: cast, then gathered."""

  def one(path, w):
    letters = DIMS["layers." + ".".join(k.key for k in path if hasattr(k, "key"))]
    if isinstance(w, Adapted):
      a, b = adapter_letters(letters)
      parts = ((w.w, letters), (w.a, a), (w.b, b))
      return Adapted(*(gathered(x.astype(dtype), own[1:]) for x, own in parts), w.scale)
    return gathered(w.astype(dtype), letters[1:]) if len(letters) > 2 else w

  return jax.tree_util.tree_map_with_path(one, weights, is_leaf=is_adapted)


class Attention(nnx.Module):
  """Grouped-query attention with RMSNorm on each query and key head before RoPE."""

  def __init__(self, config: Qwen3Config, rngs: nnx.Rngs):
    self.config = config
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
      setattr(self, name, _param(config, rngs, f"layers.self_attn.{name}"))

  def __call__(self, x_BTD, angles, attend):
    eps, head_dim = self.config.rms_norm_eps, self.config.head_dim
    q_BTNH = constrain(to_heads(x_BTD, self.q_proj.get_value(), head_dim), "BTNH")
    k_BTKH = constrain(to_heads(x_BTD, self.k_proj.get_value(), head_dim), "BTKH")
    v_BTKH = constrain(to_heads(x_BTD, self.v_proj.get_value(), head_dim), "BTKH")
    q_BTNH = rope(rms_norm(q_BTNH, self.q_norm[...], eps), *angles)
    k_BTKH = rope(rms_norm(k_BTKH, self.k_norm[...], eps), *angles)
    o_BTNH, kept = attend(q_BTNH, k_BTKH, v_BTKH)
    o_BTNH = constrain(o_BTNH, "BTNH")
    return from_heads(o_BTNH, self.o_proj.get_value()), kept


class MLP(nnx.Module):
  """SwiGLU: down(silu(gate(x)) * up(x))."""

  def __init__(self, config: Qwen3Config, rngs: nnx.Rngs):
    for name in ("gate_proj", "up_proj", "down_proj"):
      setattr(self, name, _param(config, rngs, f"layers.mlp.{name}"))

  def __call__(self, x_BTD):
    gate_BTF = constrain(linear(x_BTD, self.gate_proj.get_value()), "BTF")
    up_BTF = constrain(linear(x_BTD, self.up_proj.get_value()), "BTF")
    return linear(jax.nn.silu(gate_BTF) * up_BTF, self.down_proj.get_value())


class Block(nnx.Module):
  """Pre-norm transformer block. Its parameters hold all layers, stacked in front."""

  def __init__(self, config: Qwen3Config, rngs: nnx.Rngs):
    self.config = config
    self.input_layernorm = _param(config, rngs, "layers.input_layernorm")
    self.self_attn = Attention(config, rngs)
    self.post_attention_layernorm = _param(config, rngs, "layers.post_attention_layernorm")
    self.mlp = MLP(config, rngs)

  def __call__(self, x_BTD, angles, attend):
    eps = self.config.rms_norm_eps
    with jax.named_scope("attention"):
      normed_BTD = rms_norm(x_BTD, self.input_layernorm[...], eps)
      mixed_BTD, kept = self.self_attn(normed_BTD, angles, attend)
      x_BTD = constrain(x_BTD + mixed_BTD, "BTD")
    with jax.named_scope("mlp"):
      normed_BTD = rms_norm(x_BTD, self.post_attention_layernorm[...], eps)
      x_BTD = constrain(x_BTD + self.mlp(normed_BTD), "BTD")
    return x_BTD, kept


class Qwen3(nnx.Module):
  """Embedding, blocks, final norm; the head is `logits`, so that it can be chunked.

  The blocks are one Block of stacked weights, scanned, or a list with a Block for each layer.
  """

  def __init__(self, config: Qwen3Config, rngs: nnx.Rngs, stacked: bool = True):
    self.config = config
    self.embed_tokens = _param(config, rngs, "embed_tokens")
    blocks = [Block(config, rngs) for _ in range(1 if stacked else config.num_layers)]
    self.layers = blocks[0] if stacked else nnx.List(blocks)
    self.norm = _param(config, rngs, "norm")
    if not config.tie_word_embeddings:
      self.lm_head = _param(config, rngs, "lm_head")

  def __call__(self, tokens_BT, positions_BT, attend, carry=None):
    """Tokens -> final hidden states.

    attend(q_BTNH, k_BTKH, v_BTKH, carry, layer) -> (o_BTNH, carry, kept) is called once a layer:
    the carry goes from layer to layer (the KV cache in decode), what is kept is stacked by layer.
    With a list of blocks the carry is a list too, one for each layer, where `layer` is 0.
    Returns x_BTD, carry, kept_L.
    """
    config = self.config
    with jax.named_scope("embed"):
      x_BTD = gathered(self.embed_tokens[...].astype(config.dtype), "VD")[tokens_BT]
      x_BTD = constrain(x_BTD, "BTD")
    wide = at_least_float32(config.dtype)
    angles = rope_angles(positions_BT, config.head_dim, config.rope_theta, wide)
    stacked = isinstance(self.layers, Block)
    graph, weights = nnx.split(self.layers if stacked else self.layers[0])

    def layer(state, weights):
      x_BTD, carry, index = state
      x_BTD = checkpoint_name(x_BTD, LAYER_INPUT)

      def attend_here(q_BTNH, k_BTKH, v_BTKH):
        o_BTNH, new_carry, kept = attend(q_BTNH, k_BTKH, v_BTKH, carry, index)
        return o_BTNH, (new_carry, kept)

      weights = gather(weights, config.dtype) if several_devices() else weights
      x_BTD, (carry, kept) = nnx.merge(graph, weights)(x_BTD, angles, attend_here)
      return (x_BTD, carry, index + 1), kept

    if config.remat != "none":
      layer = jax.checkpoint(layer, policy=REMAT[config.remat], prevent_cse=False)
    if stacked:
      state = (x_BTD, carry, jnp.int32(0))
      (x_BTD, carry, _), kept_L = jax.lax.scan(layer, state, weights)
    else:
      carry, kept = list(carry or [None] * config.num_layers), []
      for i, block in enumerate(self.layers):
        (x_BTD, carry[i], _), kept_here = layer((x_BTD, carry[i], 0), nnx.state(block))
        kept.append(kept_here)
      kept_L = jax.tree.map(lambda *x: jnp.stack(x), *kept)
    return rms_norm(x_BTD, self.norm[...], config.rms_norm_eps), carry, kept_L

  def head(self):
    """[V, D]: the tied embedding or the separate head."""
    return (self.embed_tokens if self.config.tie_word_embeddings else self.lm_head)[...]

  def logits(self, x):
    """x [..., D] -> float32 logits [..., V]."""
    wide = at_least_float32(self.config.dtype)
    return linear(x, self.head(), out_dtype=wide)


LAYER_INPUT = "layer_input"

# What the backward pass finds of a layer beside its input; it computes the rest again.
REMAT = {
  "none": None,  # everything is kept
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # products with weights
  "attention": jax.checkpoint_policies.save_only_these_names(*RESIDUALS),  # of its kernel
  "layer": jax.checkpoint_policies.nothing_saveable,
  "offload": jax.checkpoint_policies.save_and_offload_only_these_names(  # its input, on the host
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[LAYER_INPUT],
    offload_src="device",
    offload_dst="pinned_host",
  ),
}


@functools.lru_cache(maxsize=64)
def _graph(config: Qwen3Config, stacked: bool):
  return nnx.split(nnx.eval_shape(lambda: Qwen3(config, nnx.Rngs(0), stacked)))


def bind(config: Qwen3Config, params: dict) -> Qwen3:
  """The NNX module around a params dict; its layers are stacked, or numbered {0: ..., 1: ...}."""
  graph, abstract = _graph(config, stacked=0 not in params["layers"])
  state = jax.tree.map(lambda x: x, abstract)
  nnx.replace_by_pure_dict(state, params)
  return nnx.merge(graph, state)


def init_params(config: Qwen3Config, key, param_dtype) -> dict:
  """Random parameters; jit it with out_shardings to make them where they live."""
  state = nnx.state(Qwen3(config, nnx.Rngs(params=key)))
  return jax.tree.map(lambda x: x.astype(param_dtype), nnx.to_pure_dict(state))


def hidden(config: Qwen3Config, params: dict, tokens_BT, positions_BT, segments_BT):
  """Final hidden states x_BTD of packed rows; tokens see their own segment's past only."""
  rows = pack(config, segments_BT)

  def attend(q_BTNH, k_BTKH, v_BTKH, carry, layer):
    return attention(config, q_BTNH, k_BTKH, v_BTKH, rows), carry, None

  return bind(config, params)(tokens_BT, positions_BT, attend)[0]


def logits(config: Qwen3Config, params: dict, x):
  """Hidden states [..., D] -> float32 logits [..., V]."""
  return bind(config, params).logits(x)


def score(config: Qwen3Config, params: dict, batch, temperature: float, chunk: int):
  """Log-probability of every token of a Batch, and the entropy of its distribution.

  Both are float32 [B, T], of logits / temperature, aligned at the target: 0 at the first token of a
  segment and on padding. No [T, V] array exists, forward or backward: logits stay inside a kernel,
  or are made for `chunk` tokens of a row at a time. Beside an adapter the head is not trained.
  """
  model = bind(config, params)
  x_BTD = hidden(config, params, batch.tokens_BT, batch.positions_BT, batch.segments_BT)
  target_BT = jnp.roll(batch.tokens_BT, -1, axis=1)
  frozen = any(map(is_adapted, jax.tree.leaves(params, is_leaf=is_adapted)))
  with jax.named_scope("head"):
    scores = score_tokens(x_BTD, model.head(), target_BT, temperature, chunk, frozen)
  behind = lambda x_BT: jnp.pad(x_BT, ((0, 0), (1, 0)))[:, :-1]  # noqa: E731
  scored_BT = (batch.segments_BT == behind(batch.segments_BT)) & (batch.segments_BT > 0)
  logp_BT, entropy_BT = (jnp.where(scored_BT, behind(x_BT), 0) for x_BT in scores)
  return logp_BT, entropy_BT


def extend(config: Qwen3Config, params: dict, tokens_BT, positions_BT, kv_cache):
  """New tokens of every sequence -> (x_BTD, kv_cache with them appended).

  Prefill and decode both: T tokens at their positions see what the cache holds before them and one
  another. A negative position is padding. With params of numbered layers the cache is a list of
  caches of one layer each.
  """

  def attend(q_BTNH, k_BTKH, v_BTKH, kv_cache, layer):
    new = (q_BTNH, k_BTKH, v_BTKH)
    return *append_and_attend(config, *new, kv_cache, layer, positions_BT), None

  x_BTD, kv_cache, _ = bind(config, params)(tokens_BT, positions_BT, attend, kv_cache)
  return x_BTD, kv_cache
