"""AdamW equals torch's, schedules are what they say, and a bad step leaves no trace."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qed_jax import optim

SETTINGS = {
  "peak_lr": 1e-2,
  "schedule": "constant",
  "warmup_steps": 0,
  "total_steps": 20,
  "b1": 0.9,
  "b2": 0.95,
  "eps": 1e-8,
  "weight_decay": 0.1,
  "clip_norm": 1.0,
  "decay_norms": False,
  "mu_dtype": "float32",
  "second_moment": "float32",
}


def make(**changes):
  return optim.make_optimizer(**SETTINGS | changes)


def make_params(dtype=jnp.float32):
  key = jax.random.key(0)
  return {
    "embed_tokens": jax.random.normal(key, (7, 4), dtype),
    "layers": {
      "input_layernorm": jnp.ones((2, 4), dtype),
      "self_attn": {"q_norm": jnp.ones((2, 3), dtype), "q_proj": jnp.ones((2, 4, 3), dtype)},
    },
    "norm": jnp.ones(4, dtype),
  }


def gradients(params, step, scale):
  keys = iter(jax.random.split(jax.random.key(step), len(jax.tree.leaves(params))))
  return jax.tree.map(lambda p: scale * jax.random.normal(next(keys), p.shape, p.dtype), params)


def as_bytes(tree):
  return [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("decay_norms", [False, True])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_equals_torch_adamw(decay_norms, schedule):
  """Fifteen steps, some clipped, decay by path, a schedule: the weights of torch.optim.AdamW."""
  torch = pytest.importorskip("torch", reason="torch is installed on the main lane only")
  optimizer = make(decay_norms=decay_norms, schedule=schedule, warmup_steps=4)
  params = make_params()
  paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
  theirs = [torch.nn.Parameter(torch.tensor(np.asarray(x))) for x in jax.tree.leaves(params)]
  norms = [decay_norms or "norm" not in path for path in paths]
  assert sum(norms) == (5 if decay_norms else 2)
  groups = [
    {"params": [p for p, d in zip(theirs, norms, strict=True) if d], "weight_decay": 0.1},
    {"params": [p for p, d in zip(theirs, norms, strict=True) if not d], "weight_decay": 0.0},
  ]
  reference = torch.optim.AdamW([g for g in groups if g["params"]], lr=1.0, betas=(0.9, 0.95))
  state = optimizer.transform.init(params)
  step_fn = jax.jit(lambda p, s, g: optim.apply_updates(optimizer, p, s, g, jnp.float32(0)))
  clipped = 0
  for step in range(15):
    grads = gradients(params, step, 10.0 if step % 3 else 0.01)
    params, state, metrics = step_fn(params, state, grads)
    for p, g in zip(theirs, jax.tree.leaves(grads), strict=True):
      p.grad = torch.tensor(np.asarray(g))
    norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    clipped += float(norm) > 1
    np.testing.assert_allclose(metrics["grad_norm"], float(norm), rtol=1e-5)
    for group in reference.param_groups:
      group["lr"] = float(optimizer.schedule(step))
    reference.step()
    assert float(metrics["skipped"]) == 0 and float(metrics["update_norm"]) > 0
  assert clipped == 10
  for name, ours, other in zip(paths, jax.tree.leaves(params), theirs, strict=True):
    np.testing.assert_allclose(ours, other.detach().numpy(), rtol=1e-5, atol=1e-6, err_msg=name)


def test_schedules():
  """Warm-up climbs by equal steps to the peak; cosine ends at zero; constant stays."""
  cosine = make(schedule="cosine", warmup_steps=4, total_steps=20, peak_lr=0.8).schedule
  rates = [float(cosine(step)) for step in range(21)]
  np.testing.assert_allclose(rates[:5], [0.2, 0.4, 0.6, 0.8, 0.8], rtol=1e-6)
  np.testing.assert_allclose(rates[12], 0.4, rtol=1e-6)
  np.testing.assert_allclose(rates[20], 0, atol=1e-7)
  assert all(a >= b for a, b in zip(rates[3:], rates[4:], strict=False))
  constant = make(warmup_steps=2, peak_lr=0.5).schedule
  np.testing.assert_allclose([float(constant(s)) for s in (0, 1, 2, 99)], [0.25, 0.5, 0.5, 0.5])
  np.testing.assert_allclose(float(make(warmup_steps=0, peak_lr=0.5).schedule(0)), 0.5)


BAD = [jnp.nan, jnp.inf, -jnp.inf]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("where", ["loss", "one gradient", "overflow"])
def test_non_finite_step_changes_no_bit(where, dtype):
  """NaN or infinity in the loss, one gradient element or the norm: params and state stay as is."""
  optimizer = make(mu_dtype=dtype)
  params = make_params(jnp.dtype(dtype))
  params["norm"] = params["norm"].at[0].set(-0.0)
  state = optimizer.transform.init(params)
  step_fn = jax.jit(lambda p, s, g, loss: optim.apply_updates(optimizer, p, s, g, loss))
  params, state, _ = step_fn(params, state, gradients(params, 0, 1.0), jnp.float32(1))
  before = as_bytes((params, state))
  rng = np.random.default_rng(0)
  for trial in range(12):
    grads, loss, bad = gradients(params, trial, 1.0), jnp.float32(1), BAD[trial % 3]
    if where == "loss":
      loss = jnp.float32(bad)
    elif where == "one gradient":
      leaves, tree = jax.tree.flatten(grads)
      leaf = rng.integers(len(leaves))
      index = rng.integers(leaves[leaf].size)
      leaves[leaf] = leaves[leaf].ravel().at[index].set(bad).reshape(leaves[leaf].shape)
      grads = jax.tree.unflatten(tree, leaves)
    else:
      grads = jax.tree.map(lambda g: jnp.full_like(g, 1e30), grads)  # finite, but not its norm
    new_params, new_state, metrics = step_fn(params, state, grads, loss)
    assert as_bytes((new_params, new_state)) == before, trial
    assert float(metrics["skipped"]) == 1 and float(metrics["update_norm"]) == 0
  # The next good step goes on as if nothing had been.
  grads = gradients(params, 99, 1.0)
  after, _, metrics = step_fn(new_params, new_state, grads, jnp.float32(1))
  assert float(metrics["skipped"]) == 0
  assert as_bytes(after) == as_bytes(step_fn(params, state, grads, jnp.float32(1))[0]) != before


def test_moments_of_bfloat16_parameters():
  """The second moment is float32 whatever the parameters are; the first is mu_dtype."""
  for mu_dtype in ("float32", "bfloat16"):
    optimizer = make(mu_dtype=mu_dtype)
    params = make_params(jnp.bfloat16)
    state = optimizer.transform.init(params)
    for step in range(2):
      params, state, _ = optim.apply_updates(
        optimizer, params, state, gradients(params, step, 1.0), jnp.float32(0)
      )
    adam = state[2]
    assert {x.dtype for x in jax.tree.leaves(adam.mu)} == {jnp.dtype(mu_dtype)}
    assert {x.dtype for x in jax.tree.leaves(adam.nu)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


def test_global_norm_of_bfloat16_is_summed_in_float32():
  """4,097 ones have the norm 64.008; a bfloat16 sum would stop growing at 256."""
  norm = optim.global_norm({"a": jnp.ones(4096, jnp.bfloat16), "b": jnp.ones(1, jnp.bfloat16)})
  np.testing.assert_allclose(norm, np.sqrt(4097), rtol=1e-6)
  assert norm.dtype == jnp.float32


def test_state_shardings_follow_the_parameters():
  """Moments lie as their parameters, counters are replicated; jit accepts them as out_shardings."""
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("fsdp",))
  params = make_params()
  replicated = NamedSharding(mesh, PartitionSpec())
  shardings = jax.tree.map(lambda _: replicated, params)
  shardings["layers"]["self_attn"]["q_proj"] = NamedSharding(mesh, PartitionSpec("fsdp"))
  shardings["norm"] = NamedSharding(mesh, PartitionSpec("fsdp"))
  optimizer = make()
  placed = optim.state_shardings(optimizer, params, shardings, replicated)
  state = jax.jit(optimizer.transform.init, out_shardings=placed)(jax.device_put(params, shardings))
  for moment in (state[2].mu, state[2].nu):
    assert jax.tree.map(lambda x: x.sharding, moment) == shardings
  assert state[2].count.sharding == replicated


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("peak_lr", 0.0),
    ("peak_lr", float("nan")),
    ("weight_decay", -0.1),
    ("clip_norm", 0.0),
    ("b1", 1.0),
    ("b2", float("nan")),
    ("eps", -1e-8),
    ("schedule", "cosin"),
    ("warmup_steps", 20),
    ("total_steps", 0),
  ],
)
def test_bad_settings_are_named(field, value):
  """A setting that cannot work is refused in one line that names it and its value."""
  with pytest.raises(ValueError, match=f"^{field} must be .*{value}") as error:
    make(**{field: value})
  assert "\n" not in str(error.value)


# --- moments in less memory


def test_rounding_to_bfloat16_is_right_on_average():
  """Between two neighbours both occur, as often as makes the mean exact; what fits stays."""
  x = jnp.float32([1.0 + 2**-10, -3.0 - 2**-9, 1e-30, 0.0, jnp.inf, jnp.nan, 256.0])
  draw = lambda key: optim.stochastic_bfloat16(x, key).astype(jnp.float32)  # noqa: E731
  drawn = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(0), 4096)))
  assert len(set(drawn[:, 0])) == 2 and len(set(drawn[:, 6])) == 1
  np.testing.assert_allclose(drawn[:, :3].mean(0), x[:3], rtol=1e-3)
  np.testing.assert_array_equal(drawn[0, 3:], [0.0, np.inf, np.nan, 256.0])


def second_moment_after(second_moment, steps):
  """nu of a parameter after a large gradient, then `steps` updates without any; b2 is 0.999."""
  optimizer = make(b2=0.999, clip_norm=None, second_moment=second_moment)
  params = {"w": jnp.zeros((64, 64))}
  state = optimizer.transform.init(params)
  update = jax.jit(lambda g, s: optimizer.transform.update(g, s, params)[1])
  state = update({"w": jnp.ones((64, 64))}, state)
  for _ in range(steps):
    state = update({"w": jnp.zeros((64, 64))}, state)
  nu = optax.tree.get(state, "nu")["w"]
  return nu, np.asarray(nu.astype(jnp.float32)).mean()


def test_a_second_moment_in_bfloat16_decays_as_in_float32():
  """By 0.999 a step, where rounding to the nearest would leave it as it is for good."""
  expected = second_moment_after("float32", 200)[1]
  nu, got = second_moment_after("bfloat16", 200)
  assert nu.dtype == jnp.bfloat16
  np.testing.assert_allclose(got, expected, rtol=2e-2)
  assert np.float32(jnp.bfloat16(1e-3) * jnp.bfloat16(0.999)) == np.float32(jnp.bfloat16(1e-3))


def train_on_a_line(second_moment, steps=60):
  """Loss of a least squares problem, before and after."""
  key = jax.random.key(3)
  x = jax.random.normal(key, (256, 128))
  y = x @ jax.random.normal(jax.random.key(4), (128, 128))
  optimizer = make(
    second_moment=second_moment, peak_lr=3e-2, weight_decay=0.0, total_steps=100, b2=0.99
  )
  params = {"w": jnp.zeros((128, 128))}
  loss = lambda p: jnp.mean((x @ p["w"] - y) ** 2)  # noqa: E731

  @jax.jit
  def step(params, state):
    value, grads = jax.value_and_grad(loss)(params)
    params, state, _ = optim.apply_updates(optimizer, params, state, grads, value)
    return params, state

  state = optimizer.transform.init(params)
  for _ in range(steps):
    params, state = step(params, state)
  return params["w"], float(loss(params))


def test_smaller_moments_train_alike():
  """bfloat16 stays within 2 % of float32's weights; factored ones reach as low a loss."""
  whole, reached = train_on_a_line("float32")
  rounded, also = train_on_a_line("bfloat16")
  assert np.linalg.norm(rounded - whole) < 0.02 * np.linalg.norm(whole)
  assert abs(also / reached - 1) < 0.05
  assert train_on_a_line("factored")[1] < 1.5 * reached


def test_a_factored_second_moment_is_adams_where_gradients_have_rank_one():
  """Rows times columns is then exact, so the first update is Adam's: bias corrections included."""
  outer = jnp.abs(jnp.outer(jnp.arange(1.0, 129), jnp.arange(1.0, 129)))
  params, updates = {"w": jnp.ones((128, 128))}, {}
  for kind in ("float32", "factored"):
    optimizer = make(second_moment=kind, clip_norm=None, weight_decay=0.0, b1=0.0)
    state = optimizer.transform.init(params)
    for scale in (1.0, 3.0, 0.5):
      updates[kind], state = optimizer.transform.update({"w": scale * outer}, state, params)
  np.testing.assert_allclose(updates["factored"]["w"], updates["float32"]["w"], rtol=1e-4)


@pytest.mark.parametrize("kind", optim.SECOND_MOMENTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_moments_take_the_bytes_that_are_said(kind, dtype):
  """moment_bytes is what planning and the check of memory believe."""
  params = {"w": jax.ShapeDtypeStruct((512, 512), dtype)}
  optimizer = make(second_moment=kind, mu_dtype="bfloat16")
  state = jax.eval_shape(optimizer.transform.init, params)
  stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  assert abs(stored / 512**2 - optim.moment_bytes("bfloat16", kind)) < 0.1


@pytest.mark.parametrize("kind", optim.SECOND_MOMENTS)
def test_a_bad_step_leaves_no_trace_in_any_moment(kind):
  optimizer = make(second_moment=kind)
  params = {"w": jnp.ones((128, 128))}
  state = optimizer.transform.init(params)
  params, state, _ = optim.apply_updates(optimizer, params, state, params, jnp.float32(0))
  before = as_bytes((params, state))
  bad = {"w": params["w"].at[0, 0].set(jnp.nan)}
  params, state, metrics = optim.apply_updates(optimizer, params, state, bad, jnp.float32(0))
  assert metrics["skipped"] == 1 and as_bytes((params, state)) == before


def test_an_unknown_second_moment_is_named():
  with pytest.raises(ValueError, match="second_moment must be one of float32, .* not 'fp8'"):
    make(second_moment="fp8")
