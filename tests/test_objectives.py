"""The losses: hand arithmetic, and properties that hold for any batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qed_jax import objectives
from qed_jax.objectives import policy_gradient, rubric_rl, sft
from qed_jax.records import Batch

QED_NANO = {
  "policy_loss": "ppo",
  "eps_low": 4.0,
  "eps_high": 4.0,
  "kl_coef": 0.0,
  "entropy_coef": 1e-4,
  "clamp_log_ratio": 5.0,
}
OPTIONS = {
  "qed_nano": QED_NANO,
  "tight": {**QED_NANO, "eps_low": 0.2, "eps_high": 0.28, "kl_coef": 0.05, "entropy_coef": 0.01},
  "reinforce": {**QED_NANO, "policy_loss": "reinforce", "kl_coef": 0.02},
}


jitted_loss = jax.jit(policy_gradient.loss, static_argnames=tuple(QED_NANO))


def policy_loss(options):
  """The loss as train jits it: options fixed, arrays in."""
  return functools.partial(jitted_loss, **options)


def five_tokens(ratio, advantage, weight, reference=None):
  """One row of five tokens with the given ratios: (logp_BT, entropy_BT, batch)."""
  logp = np.log([0.5, 0.25, 0.125, 0.5, 0.0625])
  zeros = jnp.zeros((1, 5), jnp.int32)

  def row(x):
    return jnp.asarray([x], jnp.float32)

  batch = Batch(
    tokens_BT=zeros,
    positions_BT=zeros,
    segments_BT=zeros + 1,
    weight_BT=row(weight),
    advantage_BT=row(advantage),
    behavior_logp_BT=row(logp - np.log(ratio)),
    reference_logp_BT=None if reference is None else row(logp + np.asarray(reference)),
  )
  return row(logp), row([0.1, 0.2, 0.3, 0.4, 0.5]), batch


def random_batch(seed=0, B=6, T=8):
  """Rows with prompts, completions and padding: (logp_BT, entropy_BT, batch)."""
  rng = np.random.default_rng(seed)

  def f32(x):
    return jnp.asarray(x, jnp.float32)

  logp = -rng.exponential(2.0, (B, T))
  start, end = rng.integers(1, 3, (B, 1)), rng.integers(5, T + 1, (B, 1))
  column = np.arange(T)[None, :]
  zeros = jnp.zeros((B, T), jnp.int32)
  batch = Batch(
    tokens_BT=zeros,
    positions_BT=zeros,
    segments_BT=zeros + 1,
    weight_BT=f32(((column >= start) & (column < end)) / B),
    advantage_BT=f32(np.broadcast_to(rng.normal(size=(B, 1)), (B, T))),
    behavior_logp_BT=f32(logp + rng.normal(size=(B, T)) * 1.5),
    reference_logp_BT=f32(logp + rng.normal(size=(B, T))),
  )
  return f32(logp), f32(rng.uniform(0, 3, (B, T))), batch


def select(batch, rows):
  return jax.tree.map(lambda x: x[rows], batch)


# --- sft


def test_sft_is_the_mean_negative_log_probability_of_the_targets():
  """Three targets among five tokens: their mean nll, entropy of the same tokens, weights 1/3."""
  is_target = jnp.array([[False, True, True, False, True]])
  logp_BT, entropy_BT, batch = five_tokens(np.ones(5), np.zeros(5), np.zeros(5))
  batch = dataclasses.replace(batch, weight_BT=jax.jit(sft.weights)(is_target))
  loss, metrics = jax.jit(sft.loss)(logp_BT, entropy_BT, batch)
  expected = -(np.log(0.25) + np.log(0.125) + np.log(0.0625)) / 3
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  means = objectives.finalise(metrics)
  np.testing.assert_allclose(means["nll"], expected, rtol=1e-6)
  np.testing.assert_allclose(means["entropy"], (0.2 + 0.3 + 0.5) / 3, rtol=1e-6)
  assert means["tokens"] == 3


def test_sft_ignores_what_is_not_a_target():
  """NaN at a token without weight reaches neither the loss nor the gradient."""
  logp_BT, entropy_BT, batch = five_tokens(np.ones(5), np.zeros(5), [0, 0.5, 0.5, 0, 0])
  spoiled = logp_BT.at[0, 0].set(jnp.nan).at[0, 4].set(-jnp.inf)
  grad = jax.grad(lambda x: sft.loss(x, entropy_BT, batch)[0])
  np.testing.assert_array_equal(grad(spoiled), [[0, -0.5, -0.5, 0, 0]])
  np.testing.assert_array_equal(
    sft.loss(spoiled, entropy_BT, batch)[0], sft.loss(logp_BT, entropy_BT, batch)[0]
  )


def test_sft_weights_without_targets_are_zero():
  """A step with nothing to train has weights 0, not 0/0."""
  np.testing.assert_array_equal(sft.weights(jnp.zeros((2, 3), bool)), np.zeros((2, 3)))


# --- policy gradient: hand arithmetic


def test_ppo_by_hand():
  """rho 2, 6 (clipped to 5), 6 with A < 0 (not clipped), 0.5; the fifth token has no weight."""
  inputs = five_tokens([2, 6, 6, 0.5, 9], [1, 1, -1, 2, 7], [0.25, 0.25, 0.25, 0.25, 0])
  loss, metrics = policy_loss({**QED_NANO, "entropy_coef": 0.1})(*inputs)
  surrogates = 2 * 1 + 5 * 1 - 6 * 1 + 0.5 * 2
  entropies = 0.1 + 0.2 + 0.3 + 0.4
  np.testing.assert_allclose(loss, -0.25 * (surrogates + 0.1 * entropies), rtol=1e-6)
  means = objectives.finalise(metrics)
  np.testing.assert_allclose(means["loss"], loss)
  np.testing.assert_allclose(means["policy_loss"], -0.25 * surrogates, rtol=1e-6)
  np.testing.assert_allclose(means["ratio"], 14.5 / 4, rtol=1e-6)
  np.testing.assert_allclose(means["ratio_max"], 6, rtol=1e-6)
  np.testing.assert_allclose(means["ess"], 14.5**2 / (4 * (4 + 36 + 36 + 0.25)), rtol=1e-6)
  np.testing.assert_allclose(means["clip_share"], 1 / 4)
  np.testing.assert_allclose(means["advantage"], 3 / 4)
  np.testing.assert_allclose(means["entropy"], entropies / 4, rtol=1e-6)
  log_ratio = np.log([2, 6, 6, 0.5])
  np.testing.assert_allclose(means["kl_behavior"], -log_ratio.mean(), rtol=1e-6)
  k3 = (np.exp(log_ratio) - 1 - log_ratio).mean()
  np.testing.assert_allclose(means["kl_behavior_k3"], k3, rtol=1e-6)
  assert means["tokens"] == 4


def test_reinforce_by_hand():
  """log pi . A . min(rho, 5), and its gradient is the last two factors: no gradient through rho."""
  inputs = five_tokens([2, 6, 6, 0.5, 9], [1, 1, -1, 2, 7], [0.25, 0.25, 0.25, 0.25, 0])
  options = {**QED_NANO, "policy_loss": "reinforce", "entropy_coef": 0.0}
  (loss, metrics), grad = jax.value_and_grad(policy_loss(options), has_aux=True)(*inputs)
  factor = np.array([2 * 1, 5 * 1, 5 * -1, 0.5 * 2, 0])
  logp = np.log([0.5, 0.25, 0.125, 0.5, 0.0625])
  np.testing.assert_allclose(loss, -0.25 * (factor * logp).sum(), rtol=1e-6)
  np.testing.assert_allclose(grad[0], -0.25 * factor, rtol=1e-6)
  np.testing.assert_allclose(objectives.finalise(metrics)["clip_share"], 2 / 4)


def test_kl_to_the_reference_by_hand():
  """k3 of log ref - log pi, clamped to [-5, 5]; the clamped token has no KL gradient."""
  inputs = five_tokens(np.ones(5), np.zeros(5), np.ones(5), reference=[0, 1, -2, 9, -9])
  options = {**QED_NANO, "kl_coef": 0.5, "entropy_coef": 0.0}
  (loss, metrics), grad = jax.value_and_grad(policy_loss(options), has_aux=True)(*inputs)
  d = np.array([0, 1, -2, 5, -5])
  np.testing.assert_allclose(loss, 0.5 * (np.exp(d) - d - 1).sum(), rtol=1e-5)
  expected = 0.5 * (1 - np.exp([0, 1, -2, 0, 0]))
  np.testing.assert_allclose(grad[0], expected, rtol=1e-5, atol=1e-6)
  mean = (np.exp(d) - d - 1).mean()
  np.testing.assert_allclose(objectives.finalise(metrics)["kl_reference"], mean, rtol=1e-5)


# --- policy gradient: properties


@pytest.mark.parametrize("name", OPTIONS)
def test_a_token_without_weight_has_no_gradient(name):
  """Whatever it holds: NaN log-probabilities, infinite behaviour, NaN advantage and entropy."""
  logp_BT, entropy_BT, batch = random_batch()
  masked_BT = batch.weight_BT == 0

  def spoil(x_BT, value):
    return jnp.where(masked_BT, value, x_BT)

  spoiled = dataclasses.replace(
    batch,
    advantage_BT=spoil(batch.advantage_BT, jnp.nan),
    behavior_logp_BT=spoil(batch.behavior_logp_BT, -jnp.inf),
    reference_logp_BT=spoil(batch.reference_logp_BT, jnp.nan),
  )
  step = jax.value_and_grad(policy_loss(OPTIONS[name]), argnums=(0, 1), has_aux=True)
  (loss, metrics), grads = step(logp_BT, entropy_BT, batch)
  (same, same_metrics), same_grads = step(
    spoil(logp_BT, jnp.nan), spoil(entropy_BT, jnp.nan), spoiled
  )
  assert loss == same
  jax.tree.map(np.testing.assert_array_equal, (metrics, grads), (same_metrics, same_grads))
  for grad_BT in grads:
    assert np.all(grad_BT[masked_BT] == 0)
    assert np.any(grad_BT[~masked_BT] != 0)


@pytest.mark.parametrize("cuts", [[1], [3], [2, 4], [1, 2, 3, 4, 5]])
@pytest.mark.parametrize("name", OPTIONS)
def test_any_split_into_microbatches_gives_the_same_step(name, cuts):
  """Losses and gradients of the parts add, and merged metrics have the means of the whole."""
  logp_BT, entropy_BT, batch = random_batch()
  step = jax.value_and_grad(policy_loss(OPTIONS[name]), argnums=(0, 1), has_aux=True)
  (loss, metrics), grads = step(logp_BT, entropy_BT, batch)
  total, merged, parts = 0.0, jax.tree.map(jnp.zeros_like, metrics), []
  for rows in np.split(np.arange(6), cuts):
    (part, part_metrics), part_grads = step(logp_BT[rows], entropy_BT[rows], select(batch, rows))
    total, merged = total + part, objectives.merge(merged, part_metrics)
    parts.append(part_grads)
  np.testing.assert_allclose(total, loss, rtol=1e-5)
  joined = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), joined, grads)
  whole, means = objectives.finalise(metrics), objectives.finalise(merged)
  assert whole.keys() == means.keys()
  for key in whole:
    np.testing.assert_allclose(means[key], whole[key], rtol=1e-5, err_msg=key)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_order_of_rows_does_not_matter(name):
  """Permuted rows: the same loss and metrics, the gradient permuted."""
  logp_BT, entropy_BT, batch = random_batch()
  rows = np.array([3, 0, 5, 1, 4, 2])
  step = jax.value_and_grad(policy_loss(OPTIONS[name]), has_aux=True)
  (loss, metrics), grad = step(logp_BT, entropy_BT, batch)
  (same, same_metrics), permuted = step(logp_BT[rows], entropy_BT[rows], select(batch, rows))
  np.testing.assert_allclose(same, loss, rtol=1e-5)
  np.testing.assert_array_equal(permuted, grad[rows])
  for key, value in objectives.finalise(metrics).items():
    np.testing.assert_allclose(objectives.finalise(same_metrics)[key], value, rtol=1e-5)


@pytest.mark.parametrize("policy", policy_gradient.POLICY_LOSSES)
def test_advantage_zero_leaves_only_the_entropy_gradient(policy):
  """A dead group moves the policy by its entropy bonus and by nothing else."""
  logp_BT, entropy_BT, batch = random_batch()
  batch = dataclasses.replace(batch, advantage_BT=jnp.zeros_like(batch.advantage_BT))
  options = {**QED_NANO, "policy_loss": policy, "entropy_coef": 0.01}
  step = jax.grad(policy_loss(options), argnums=(0, 1), has_aux=True)
  (logp_grad, entropy_grad), _ = step(logp_BT, entropy_BT, batch)
  np.testing.assert_array_equal(logp_grad, np.zeros_like(logp_grad))
  np.testing.assert_allclose(entropy_grad, -0.01 * batch.weight_BT, rtol=1e-6)


def test_the_clip_of_qed_nano_acts_only_above_five_with_positive_advantage():
  """On a grid of ratios and signs the gradient vanishes there and is -w rho A everywhere else."""
  for ratio in (1e-3, 0.5, 1.0, 4.9, 5.1, 30.0):
    for advantage in (-1.0, 1.0):
      inputs = five_tokens(np.full(5, ratio), np.full(5, advantage), np.full(5, 0.5))
      grad, metrics = jax.grad(policy_loss(QED_NANO), has_aux=True)(*inputs)
      clipped = ratio > 5 and advantage > 0
      expected = np.full((1, 5), 0.0 if clipped else -0.5 * ratio * advantage)
      np.testing.assert_allclose(grad, expected, rtol=1e-5)
      assert objectives.finalise(metrics)["clip_share"] == clipped


def test_a_tight_clip_has_two_sides():
  """eps_low stops a token that is already unlikely enough, eps_high one already likely enough."""
  options = {**QED_NANO, "eps_low": 0.2, "eps_high": 0.3, "entropy_coef": 0.0}
  inputs = five_tokens([0.75, 0.75, 1.35, 1.35, 1.25], [1, -1, 1, -1, 1], np.ones(5))
  grad, metrics = jax.grad(policy_loss(options), has_aux=True)(*inputs)
  np.testing.assert_allclose(grad, [[-0.75, 0, 0, 1.35, -1.25]], rtol=1e-5)
  np.testing.assert_allclose(objectives.finalise(metrics)["clip_share"], 2 / 5)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradient_equals_finite_differences(name):
  """With respect to the logits, in float64, for a policy over five tokens at temperature 0.8.

  The surrogate of reinforce is not the loss's derivative by rho, so there rho is held fixed.
  """
  with jax.enable_x64(True):
    rng = np.random.default_rng(1)
    _, _, batch = random_batch()
    batch = jax.tree.map(lambda x: x.astype(float), select(batch, slice(0, 2)))
    z_BTV = rng.normal(size=(2, 8, 5))
    chosen_BTV = np.eye(5)[rng.integers(0, 5, (2, 8))]
    options = OPTIONS[name]

    def loss(z_BTV, fixed_BTV):
      logp_BTV, fixed_BTV = (jax.nn.log_softmax(z / 0.8) for z in (z_BTV, fixed_BTV))
      logp_BT = jnp.einsum("BTV,BTV->BT", logp_BTV, chosen_BTV)
      fixed_BT = jnp.einsum("BTV,BTV->BT", fixed_BTV, chosen_BTV)
      entropy_BT = -jnp.einsum("BTV,BTV->BT", jnp.exp(logp_BTV), logp_BTV)
      behavior_BT = batch.behavior_logp_BT
      if options["policy_loss"] == "reinforce":
        behavior_BT = behavior_BT + logp_BT - fixed_BT
      here = dataclasses.replace(batch, behavior_logp_BT=behavior_BT)
      return policy_gradient.loss(logp_BT, entropy_BT, here, **options)[0]

    grad_BTV = jax.jit(jax.grad(loss))(z_BTV, z_BTV)
    value = jax.jit(loss)
    for b, t, v in [(0, 0, 0), (0, 3, 1), (1, 2, 4), (1, 4, 0), (0, 4, 2)]:
      nudge_BTV = np.zeros_like(z_BTV)
      nudge_BTV[b, t, v] = 1e-5
      slope = (value(z_BTV + nudge_BTV, z_BTV) - value(z_BTV - nudge_BTV, z_BTV)) / 2e-5
      np.testing.assert_allclose(grad_BTV[b, t, v], slope, rtol=1e-6, atol=1e-10)


def test_an_overflowing_ratio_of_a_dead_group_is_harmless():
  """A = 0 with a ratio beyond float32 gives a finite loss: 0 times infinity never happens."""
  logp_BT, entropy_BT, batch = five_tokens(np.ones(5), np.zeros(5), np.ones(5))
  batch = dataclasses.replace(batch, behavior_logp_BT=jnp.full((1, 5), -500.0))
  (loss, metrics), grad = jax.value_and_grad(policy_loss(QED_NANO), has_aux=True)(
    logp_BT, entropy_BT, batch
  )
  assert np.isfinite(loss) and np.all(grad == 0)
  assert all(np.isfinite(value) for value in objectives.finalise(metrics).values())


def test_coefficients_may_follow_a_schedule():
  """Traced coefficients give the numbers of constant ones."""
  inputs = random_batch()
  fixed = {"policy_loss": "ppo"}
  traced = {key: value for key, value in OPTIONS["tight"].items() if key not in fixed}
  jitted = jax.jit(lambda arrays, kw: policy_gradient.loss(*arrays, **kw, **fixed)[0])
  np.testing.assert_allclose(
    jitted(inputs, traced), policy_loss(OPTIONS["tight"])(*inputs)[0], rtol=1e-6
  )


def test_wrong_options_are_named():
  """An unknown loss, or a KL coefficient without reference, is refused with the value."""
  logp_BT, entropy_BT, batch = random_batch()
  with pytest.raises(ValueError, match="'gspo'.*ppo, reinforce"):
    policy_gradient.loss(logp_BT, entropy_BT, batch, **{**QED_NANO, "policy_loss": "gspo"})
  without = dataclasses.replace(batch, reference_logp_BT=None)
  with pytest.raises(ValueError, match="kl_coef is 0.1 .*reference_logp_BT"):
    policy_gradient.loss(logp_BT, entropy_BT, without, **{**QED_NANO, "kl_coef": 0.1})
  assert "kl_reference" not in policy_loss(QED_NANO)(logp_BT, entropy_BT, without)[1]


def test_on_policy_tokens_have_full_effective_sample_size():
  """rho = 1 everywhere: ess 1, both KL estimates 0, nothing clipped."""
  logp_BT, entropy_BT, batch = random_batch()
  batch = dataclasses.replace(batch, behavior_logp_BT=logp_BT)
  means = objectives.finalise(policy_loss(QED_NANO)(logp_BT, entropy_BT, batch)[1])
  assert means["ess"] == means["ratio"] == means["ratio_max"] == 1
  assert means["kl_behavior"] == means["kl_behavior_k3"] == means["clip_share"] == 0


def test_effective_sample_size_by_lag():
  """(sum rho)^2 / (n sum rho^2) of the trained tokens of each lag; the last bucket is open."""
  ratio, lag = [1.0, 3.0, 2.0, 0.5, 7.0], [0, 0, 2, 9, 1]
  logp_BT, entropy_BT, batch = five_tokens(ratio, [1.0] * 5, [1.0, 1.0, 1.0, 1.0, 0.0])
  batch = dataclasses.replace(batch, lag_BT=jnp.asarray([lag], jnp.int32))
  values = objectives.finalise(policy_loss(QED_NANO)(logp_BT, entropy_BT, batch)[1])
  assert values["ess_lag_0"] == pytest.approx((1 + 3) ** 2 / (2 * (1 + 9)))
  assert values["ess_lag_2"] == values["ess_lag_3"] == pytest.approx(1)
  assert [values[f"share_lag_{i}"] for i in range(4)] == pytest.approx([0.5, 0, 0.25, 0.25])
  assert "ess_lag_1" not in values and not any("ratio_sq" in name for name in values)


def test_finalise_leaves_out_a_mean_over_nothing():
  """A batch without trained tokens has no mean ratio; it is not reported as 0."""
  logp_BT, entropy_BT, batch = random_batch()
  batch = dataclasses.replace(batch, weight_BT=jnp.zeros_like(batch.weight_BT))
  means = objectives.finalise(policy_loss(QED_NANO)(logp_BT, entropy_BT, batch)[1])
  assert set(means) == {"loss", "policy_loss", "tokens", "ratio_max"}
  assert means["loss"] == 0


def test_a_rollout_that_could_not_be_graded_changes_nothing():
  """The step with a None-graded rollout has the loss and gradients of the step without it."""

  def step(scores, rows):
    logp_BT, entropy_BT, batch = random_batch(B=4)
    reward_PA, valid_PA = rubric_rl.rewards([scores], max_score=7)
    advantage_PA, _ = rubric_rl.advantages(
      reward_PA, valid_PA, baseline="mean", normalize_std=False
    )
    lengths = np.full(reward_PA.shape, 4)
    weight_PA = rubric_rl.weights(
      lengths, valid_PA, lengths > 9, normalizer="rollouts", overlong_filter=False
    )
    rollout_BT = jnp.where(batch.weight_BT > 0, jnp.arange(4)[:, None], -1)[rows]
    rollout_BT = jnp.where(rollout_BT >= 0, jnp.arange(len(rows))[:, None], -1)
    batch = dataclasses.replace(
      select(batch, rows),
      weight_BT=rubric_rl.spread(weight_PA[0], rollout_BT),
      advantage_BT=rubric_rl.spread(advantage_PA[0], rollout_BT),
    )
    return jax.value_and_grad(policy_loss(QED_NANO), has_aux=True)(
      logp_BT[rows], entropy_BT[rows], batch
    )

  (with_failure, _), grad = step([7, None, 2, 0], np.array([0, 1, 2, 3]))
  (without, _), grad_without = step([7, 2, 0], np.array([0, 2, 3]))
  np.testing.assert_allclose(with_failure, without, rtol=1e-6)
  np.testing.assert_allclose(grad[np.array([0, 2, 3])], grad_without, rtol=1e-6)
  assert np.all(grad[1] == 0) and np.any(grad[0] != 0)
