"""Low-rank adapters (LoRA, Hu et al. 2021): the weight w of a linear layer becomes w + alpha/r b a.

Only a [R, in] and b [out, R] are trained, stacked by layer like all weights: {"layers":
{"self_attn": {"q_proj": {"a": ..., "b": ...}}}}. a begins random and b at zero, so that an adapter
begins as no change at all. The frozen weights stay what they are: `attach` puts an `Adapted`, which
holds both, where the weight was, and costs nothing.
"""

import dataclasses
import difflib
import fnmatch
import math

import jax
import jax.numpy as jnp

from qed_jax.model.layers import Adapted, einsum
from qed_jax.model.qwen3 import DIMS, Qwen3Config, adapter_letters, flatten, shapes, unflatten

TARGETS = tuple(path for path in DIMS if path.endswith("_proj"))
ALL = "all-linear"


@dataclasses.dataclass(frozen=True)
class Adapter:
  """rank, alpha, and the paths of qwen3.DIMS that it changes, in the table's order."""

  rank: int
  alpha: float
  targets: tuple[str, ...]

  @property
  def scale(self) -> float:
    return self.alpha / self.rank


def from_config(block) -> Adapter | None:
  """As `parse`, of a config's `lora` block."""
  return parse(block.rank, block.alpha, block.targets)


def parse(rank: int, alpha: float, targets: str) -> Adapter | None:
  """The fields of a config -> Adapter, or None where rank is 0. Raises ValueError, one line.

  targets: names with commas between them. A name is a path of DIMS or its end, as PEFT has it
  ("q_proj", "mlp.up_proj"), with * and ? as wildcards; "all-linear" is every linear layer.
  """
  if rank == 0:
    return None
  found = set()
  for name in [part.strip() for part in targets.split(",") if part.strip()]:
    pattern = "*" if name == ALL else name
    hits = {p for p in TARGETS if any(fnmatch.fnmatchcase(p, q) for q in (pattern, f"*.{pattern}"))}
    if not hits:
      raise ValueError(f"config.lora.targets names {name!r}, which {_nearest(name)}")
    found |= hits
  if not found:
    raise ValueError(
      f"config.lora.rank is {rank} and config.lora.targets is empty: name layers, or {ALL}"
    )
  return Adapter(rank, float(alpha), tuple(p for p in TARGETS if p in found))


def _nearest(name: str) -> str:
  """Why a name is no target, and what would be."""
  last = [path.split(".")[-1] for path in TARGETS]
  if any(fnmatch.fnmatchcase(p, q) for p in DIMS for q in (name, f"*.{name}")):
    return f"is not a linear layer of a block: use {ALL}, or of {', '.join(last)}"
  near = difflib.get_close_matches(name.split(".")[-1], last, n=2, cutoff=0.5)
  meant = f"did you mean {' or '.join(near)}? " if near else ""
  return f"matches no layer: {meant}use {ALL}, or of {', '.join(last)}"


def check_rank(adapter: Adapter, config: Qwen3Config) -> None:
  """Raises ValueError, one line, when a product b a could not have the rank it is given."""
  for path in adapter.targets:
    outputs, inputs = sizes(config, path)
    if adapter.rank > min(outputs, inputs):
      raise ValueError(
        f"config.lora.rank is {adapter.rank}, but {path} is [{outputs}, {inputs}]: "
        f"give at most {min(outputs, inputs)}"
      )


def sizes(config: Qwen3Config, path: str) -> tuple[int, int]:
  """Outputs and inputs of a linear layer."""
  a, b = (_shape(config, path, letters) for letters in adapter_letters(DIMS[path]))
  return math.prod(b[1:-1]), math.prod(a[2:])


def _shape(config: Qwen3Config, path: str, letters: str) -> tuple[int, ...]:
  known = dict(zip(DIMS[path], shapes(config)[path], strict=True))
  return tuple(known.get(letter, 1) for letter in letters)


def letters(adapter: Adapter) -> dict[str, str]:
  """{"layers.mlp.up_proj.a": "LRD", "layers.mlp.up_proj.b": "LFR", ...}."""
  pairs = ((path, adapter_letters(DIMS[path])) for path in adapter.targets)
  return {
    f"{path}.{part}": own for path, both in pairs for part, own in zip("ab", both, strict=True)
  }


def adapter_shapes(adapter: Adapter, config: Qwen3Config) -> dict[str, tuple[int, ...]]:
  """Path -> shape, for every array that is trained."""
  found = {}
  for path, own in letters(adapter).items():
    shape = _shape(config, path.rpartition(".")[0], own)
    found[path] = tuple(adapter.rank if d == "R" else n for d, n in zip(own, shape, strict=True))
  return found


def count(adapter: Adapter, config: Qwen3Config) -> int:
  """Parameters that are trained."""
  return sum(math.prod(shape) for shape in adapter_shapes(adapter, config).values())


def describe(adapter: Adapter, config: Qwen3Config) -> str:
  """In words for people: rank, layers, and how many parameters of how many."""
  trained, total = count(adapter, config), sum(map(math.prod, shapes(config).values()))
  names = ", ".join(path.split(".")[-1] for path in adapter.targets)
  share = f"{trained / 1e6:.3g} M parameters ({trained / total:.2%})"
  return f"an adapter of rank {adapter.rank} on {names}: {share}"


def init_adapter(adapter: Adapter, config: Qwen3Config, key, dtype) -> dict:
  """a uniform within +-1 / sqrt(inputs), as PEFT has it, and b zero."""
  leaves = {}
  for i, (path, shape) in enumerate(adapter_shapes(adapter, config).items()):
    bound = sizes(config, path.rpartition(".")[0])[1] ** -0.5
    own = jax.random.fold_in(key, i)
    uniform = lambda: jax.random.uniform(own, shape, jnp.float32, -bound, bound)  # noqa: B023, E731
    leaves[path] = (uniform() if path.endswith(".a") else jnp.zeros(shape)).astype(dtype)
  return unflatten(leaves)


def attach(base: dict, trained: dict, scale: float) -> dict:
  """The parameters with an Adapted at each target; nothing is copied."""
  leaves, changes = flatten(base), flatten(trained)
  for path in {name.rpartition(".")[0] for name in changes}:
    leaves[path] = Adapted(leaves[path], changes[f"{path}.a"], changes[f"{path}.b"], scale)
  return unflatten(leaves)


def letters_in(params: dict) -> dict:
  """The letters of every array of a tree of parameters, an Adapted of them at each target."""

  def one(path, x):
    own = DIMS[path]
    return Adapted(own, *adapter_letters(own), x.scale) if isinstance(x, Adapted) else own

  return unflatten({path: one(path, x) for path, x in flatten(params).items()})


def merge(params: dict, dtype) -> dict:
  """Parameters whose Adapted are plain weights again: added up in float32, rounded once to `dtype`.

  Jitted with the weights donated, each changes in place, a layer at a time.
  """

  def one(path, x):
    if not isinstance(x, Adapted):
      return x.astype(dtype)
    (a, b), own = adapter_letters(DIMS[path]), DIMS[path]

    def of_layer(i, w):
      low_out, low_in = (part[i].astype(jnp.float32) for part in (x.b, x.a))
      change = einsum(f"{b[1:]},{a[1:]}->{own[1:]}", low_out, low_in)
      return w.at[i].set((w[i].astype(jnp.float32) + x.scale * change).astype(w.dtype))

    wide = x.w.astype(jnp.promote_types(x.w.dtype, dtype))
    return jax.lax.fori_loop(0, wide.shape[0], of_layer, wide).astype(dtype)

  return unflatten({path: one(path, x) for path, x in flatten(params).items()})


def whole(adapter: Adapter | None, frozen: dict, trained: dict) -> dict:
  """The policy's parameters: what is trained is all of them, or the adapter of the frozen ones."""
  return trained if adapter is None else attach(frozen, trained, adapter.scale)
