"""Names of what a forward kernel leaves for its backward pass: jax.checkpoint may keep them."""

from jax.ad_checkpoint import checkpoint_name

RESIDUALS = ("attention_output", "attention_lse")


def named(output, lse):
  """The two under their names; a policy that saves them spares a second run of the kernel."""
  return tuple(map(checkpoint_name, (output, lse), RESIDUALS))
