"""AdamW with a schedule and clipping, moments in less memory, and updates that cannot be spoilt."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Optimizer(NamedTuple):
  """An optax transformation, and the learning rate of update number `count` (from 0)."""

  transform: optax.GradientTransformation
  schedule: Callable[[Any], Any]


def make_optimizer(
  *,
  peak_lr: float,
  schedule: str,
  warmup_steps: int,
  total_steps: int,
  b1: float,
  b2: float,
  eps: float,
  weight_decay: float,
  clip_norm: float | None,
  decay_norms: bool,
  mu_dtype: str,
  second_moment: str,
) -> Optimizer:
  """AdamW as torch.optim.AdamW computes it (decoupled decay), after clipping by global norm.

  schedule: "cosine" (to zero at total_steps) or "constant"; both after a linear warm-up whose first
  update already has peak_lr / warmup_steps, so that no update is spent at zero. weight_decay: of
  all parameters, the RMSNorm scales among them only if decay_norms. clip_norm: None clips nothing.
  mu_dtype: dtype of the first moment. second_moment: "float32"; "bfloat16", rounded up or down at
  random by how near each is, since to the nearest a decay by 0.999 is no decay at all; or
  "factored", means over rows and columns alone (Adafactor, arXiv:1804.04235), with the first moment
  taken of what they have scaled. Raises ValueError that names the argument.
  """
  at_least = {"warmup_steps": warmup_steps, "weight_decay": weight_decay, "eps": eps}
  above = {"peak_lr": peak_lr, "total_steps": total_steps}
  if clip_norm is not None:
    above["clip_norm"] = clip_norm
  for name, value in (at_least | above).items():
    if not math.isfinite(value) or value < 0 or (name in above and value == 0):
      bound = "above 0" if name in above else "at least 0"
      raise ValueError(f"{name} must be finite and {bound}, not {value}")
  for name, value in (("b1", b1), ("b2", b2)):
    if not 0 <= value < 1:
      raise ValueError(f"{name} must be in [0, 1), not {value}")
  if schedule not in ("cosine", "constant"):
    raise ValueError(f"schedule must be 'cosine' or 'constant', not {schedule!r}")
  if second_moment not in SECOND_MOMENTS:
    choices = ", ".join(SECOND_MOMENTS)
    raise ValueError(f"second_moment must be one of {choices}, not {second_moment!r}")
  if warmup_steps >= total_steps:
    raise ValueError(f"warmup_steps must be below total_steps {total_steps}, not {warmup_steps}")

  def learning_rate(count):
    count = jnp.asarray(count, jnp.float32)
    if schedule == "cosine":
      progress = jnp.clip((count - warmup_steps) / (total_steps - warmup_steps), 0, 1)
      factor = 0.5 + 0.5 * jnp.cos(jnp.pi * progress)
    else:
      factor = 1.0
    return peak_lr * factor * jnp.minimum(1.0, (count + 1) / max(warmup_steps, 1))

  adam = SECOND_MOMENTS[second_moment](b1, b2, eps, jnp.dtype(mu_dtype))
  transform = optax.chain(
    optax.stateless(lambda updates, _: _widen(updates)),
    optax.clip_by_global_norm(clip_norm) if clip_norm is not None else optax.identity(),
    # optax gives the second moment the parameters' dtype; bfloat16 parameters get a float32 one.
    optax.GradientTransformation(
      lambda params: adam.init(_widen(params)),
      lambda updates, state, params: adam.update(updates, state, _widen(params)),
    ),
    optax.add_decayed_weights(weight_decay, lambda params: decay_mask(params, decay_norms)),
    optax.scale_by_learning_rate(learning_rate),
  )
  return Optimizer(transform, learning_rate)


def whole_moments(b1: float, b2: float, eps: float, mu_dtype):
  """Adam's scaling, the second moment in float32."""
  return optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)


def rounded_moments(b1: float, b2: float, eps: float, mu_dtype):
  """Adam's scaling, the second moment kept in bfloat16 by stochastic rounding.

  What is rounded is right on average, so moving averages drift nowhere. The noise is that of the
  number of the update and of the parameter: the same run rounds the same way.
  """
  adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)

  def init(params):
    state = adam.init(params)
    return state._replace(nu=jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.nu))

  def update(updates, state, params=None):
    updates, new = adam.update(updates, state._replace(nu=_widen(state.nu)), params)
    leaves, structure = jax.tree.flatten(new.nu)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), new.count), len(leaves))
    rounded = [stochastic_bfloat16(x, key) for x, key in zip(leaves, keys, strict=True)]
    return updates, new._replace(nu=jax.tree.unflatten(structure, rounded))

  return optax.GradientTransformation(init, update)


def factored_moments(b1: float, b2: float, eps: float, mu_dtype):
  """optax's factored second moment with Adam's decay and bias correction, then a first moment.

  Arrays with fewer than two dimensions of 128 keep a whole second moment.
  """

  def decay(count, _):
    # The decay with which a plain average is Adam's, divided by 1 - b2^t.
    t = jnp.asarray(count, jnp.float32) + 1
    return b2 * (1 - b2 ** (t - 1)) / (1 - b2**t)

  return optax.chain(
    optax.scale_by_factored_rms(decay_rate_fn=decay, epsilon=eps**2),
    optax.ema(b1, debias=True, accumulator_dtype=mu_dtype),
  )


SECOND_MOMENTS = {
  "float32": whole_moments,
  "bfloat16": rounded_moments,
  "factored": factored_moments,
}


def stochastic_bfloat16(x, key):
  """float32 -> bfloat16, up with the probability that makes the mean exact; nan and inf stay."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  upper = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
  return jnp.where(jnp.isfinite(x), upper, x).astype(jnp.bfloat16)


def moment_bytes(mu_dtype: str, second_moment: str) -> float:
  """Bytes of a parameter's two moments; factored ones are too few to count."""
  second = {"float32": 4, "bfloat16": 2, "factored": 0}
  return jnp.dtype(mu_dtype).itemsize + second[second_moment]


def decay_mask(params: Any, decay_norms: bool) -> Any:
  """True where weight decay applies: everywhere, or not where the path ends in a norm."""

  def decays(path, _):
    last = jax.tree_util.keystr(path[-1:], simple=True)
    return decay_norms or not last.split(".")[-1].endswith("norm")

  return jax.tree_util.tree_map_with_path(decays, params)


def state_shardings(optimizer: Optimizer, params: Any, shardings: Any, replicated: Any) -> Any:
  """Shardings of the optimizer's state: a moment lies as its parameter does, the rest `replicated`.

  params: pytree of arrays or ShapeDtypeStructs; shardings: the same tree of shardings.
  """
  leaves = zip(
    jax.tree_util.tree_flatten_with_path(params)[0], jax.tree.leaves(shardings), strict=True
  )
  by_path = {path: (leaf.shape, sharding) for (path, leaf), sharding in leaves}

  def place(path, leaf):
    for start in range(len(path)):
      shape, sharding = by_path.get(path[start:], (None, None))
      if shape == leaf.shape:
        return sharding
    return replicated

  state = jax.eval_shape(optimizer.transform.init, params)
  return jax.tree_util.tree_map_with_path(place, state)


def apply_updates(
  optimizer: Optimizer, params: Any, opt_state: Any, grads: Any, loss: jax.Array
) -> tuple[Any, Any, dict[str, jax.Array]]:
  """One update -> (params, opt_state, metrics); pure, to be jitted with params and state donated.

  When the loss, the norm of the gradient or that of the update is not finite, params and opt_state
  come back bit for bit as they were (the schedule does not advance either). metrics, float32:
  grad_norm (before clipping), update_norm (of what was added; 0 when skipped), skipped (0 or 1).
  """
  grad_norm = global_norm(grads)
  updates, new_state = optimizer.transform.update(grads, opt_state, params)
  update_norm = global_norm(updates)
  good = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(update_norm)

  def choose(new, old):
    return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

  metrics = {
    "grad_norm": grad_norm,
    "update_norm": jnp.where(good, update_norm, 0.0),
    "skipped": 1.0 - good.astype(jnp.float32),
  }
  return choose(optax.apply_updates(params, updates), params), choose(new_state, opt_state), metrics


def global_norm(tree: Any) -> jax.Array:
  """Euclidean norm of all leaves together, summed in float32 (float64 if a leaf is)."""
  return optax.tree.norm(_widen(tree))


def _widen(tree):
  """bfloat16 and float16 leaves as float32."""
  return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)
