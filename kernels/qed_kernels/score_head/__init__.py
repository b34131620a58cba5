"""The scoring head: log-probabilities of target tokens, and entropies, from hidden states.

  logp_BT, entropy_BT = score_head(x_BTD, w_VD, target_BT, temperature, chunk=1024, pin=None)

Both are of softmax(x w / temperature), and so are their gradients; no array of logits is larger
than a block. `reference`, which does make them all, `xla` and `pallas_tpu` compute the same; "auto"
takes the first that the device and the case allow, and one that cannot serve a case refuses it with
NotImplementedError.
"""

import jax

from qed_kernels.choice import first_that_serves, known, on_tpu
from qed_kernels.score_head import pallas_tpu, reference, xla


def _reference(x_BTD, w_VD, target_BT, temperature, chunk, pin, frozen):
  return reference.score_head(x_BTD, _held(w_VD, frozen), target_BT, temperature)


def _xla(x_BTD, w_VD, target_BT, temperature, chunk, pin, frozen):
  # What is not used of its backward pass is left out by XLA.
  return xla.score_head(x_BTD, _held(w_VD, frozen), target_BT, temperature, chunk, pin)


def _held(w_VD, frozen: bool):
  return jax.lax.stop_gradient(w_VD) if frozen else w_VD


IMPLEMENTATIONS = {
  "reference": _reference,
  "xla": _xla,
  "pallas_tpu": pallas_tpu.score_head,
}


def score_head(
  x_BTD, w_VD, target_BT, temperature, *, chunk: int, pin=None, frozen=False, implementation="auto"
):
  """-> logp_BT, entropy_BT: float32, or float64 where x is. Targets are within the vocabulary.

  x_BTD: bfloat16 or float32; the head w_VD is cast to its type for the products, which are summed
  in float32. temperature: a number or a scalar array, not differentiated. chunk: tokens of a row
  whose logits `xla` makes at once. pin: None on one device; on a mesh, (array, letters) -> array,
  hashable, to lay out the logits "BCV" of a chunk. frozen: the head's gradient is zero, and is not
  computed. Raises ValueError for an unknown implementation,
  and NotImplementedError where the one that was asked for cannot serve the case.
  """
  arguments = (x_BTD, w_VD, target_BT, temperature, chunk, pin, frozen)
  return first_that_serves("score_head", IMPLEMENTATIONS, candidates(implementation), *arguments)


def candidates(implementation: str) -> tuple[str, ...]:
  """Names to try, the best first. Raises ValueError, one line, for one that does not exist."""
  if implementation == "auto":
    return ("pallas_tpu", "xla") if on_tpu() else ("xla",)
  return known("score_head", implementation, IMPLEMENTATIONS)
