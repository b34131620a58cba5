"""Objectives: pure functions, log-probabilities in, loss and metrics out. They never see a model.

Read sft, policy_gradient, rubric_rl, reasoning_cache, in this order.

A loss is a sum over tokens whose weights already hold the step's normaliser, so losses and
gradients of microbatches add up to those of the step, however it was split. Metrics follow the same
rule; their form says how they merge:
  a scalar                    a sum, reported as it is
  a pair (sum, count)         a mean, divided only by `finalise`
  a scalar named "..._max"    a maximum of numbers that are not negative
`merge` joins the metrics of two microbatches; zeros of the same structure are its neutral element.
"""

import jax
import jax.numpy as jnp


def merge(a, b):
  """Metrics of two disjoint parts of a step -> metrics of both. Pure, usable inside a scan."""
  assert a.keys() == b.keys(), f"metrics differ: {sorted(a)} and {sorted(b)}"
  return {
    name: jax.tree.map(jnp.maximum if name.endswith("_max") else jnp.add, a[name], b[name])
    for name in a
  }


def finalise(metrics) -> dict[str, float]:
  """Summed metrics -> plain floats to log; a mean over nothing is left out, it is not a zero.

  "ess" is added where "ratio" and "ratio_sq" are means, "ess_lag_2" where "ratio_lag_2" and
  "ratio_sq_lag_2" are: the effective sample size as a share of the tokens, (sum rho)^2 /
  (n sum rho^2), in (0, 1] (PipelineRL, arXiv 2509.19128).
  """
  values = {}
  for name, value in jax.device_get(metrics).items():
    if not isinstance(value, tuple):
      values[name] = float(value)
    elif value[1] > 0:
      values[name] = float(value[0]) / float(value[1])
  for name in [name for name in values if name.startswith("ratio_sq")]:
    mean_square, of = values.pop(name), name.removeprefix("ratio_sq")
    if mean_square > 0:
      values[f"ess{of}"] = values[f"ratio{of}"] ** 2 / mean_square
  return values
