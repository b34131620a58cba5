"""One suite for every implementation of the scoring head, against a float64 reference."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from qed_kernels.score_head import IMPLEMENTATIONS, pallas_tpu, score_head

from qed_jax.model.head import score_tokens
from qed_jax.sharding import make_mesh

FAST = ["xla", "pallas_tpu"]  # in its interpreter
NAMES = ("logp", "entropy", "dx", "dw")
LIMITS = {
  "float32": dict.fromkeys(NAMES, 1e-5),
  "bfloat16": dict(zip(NAMES, (1e-6, 1e-6, 5e-3, 5e-3), strict=True)),
}
OFF_EVERY_BLOCK = (2, 301, 128, 600)
# B, T, D, V: within a block; off every block; whole blocks; one token; the same in bfloat16.
CASES = [
  ((1, 96, 128, 64), "float32"), (OFF_EVERY_BLOCK, "float32"), ((2, 256, 256, 512), "float32"),
  ((1, 1, 128, 130), "float32"), (OFF_EVERY_BLOCK, "bfloat16"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Several groups, several tiles in each, and two halves of the vocabulary."""

  def blocks(M, V, D, itemsize):
    return pallas_tpu.Blocks(256, 128, 128, 1 << 20, 2 if V > 128 else 1)

  monkeypatch.setattr(pallas_tpu, "blocks", blocks)


def draw(shape, std: float = 1, seed: int = 0, dtype: str = "float32"):
  """x, w with logits of this standard deviation, targets, and the cotangents of both scores."""
  rng = np.random.default_rng(seed)
  B, T, D, V = shape
  x_BTD = jnp.asarray(rng.standard_normal((B, T, D)), dtype)
  # Values that bfloat16 has, so that the reference is of the same head.
  w_VD = jnp.asarray(rng.standard_normal((V, D)) * std / D**0.5, dtype).astype("float32")
  target_BT = jnp.asarray(rng.integers(0, V, (B, T)), "int32")
  cotangents = [jnp.asarray(rng.standard_normal((B, T)), "float32") for _ in range(2)]
  return x_BTD, w_VD, target_BT, *cotangents


@functools.partial(jax.jit, static_argnums=(0, 2))
def both(name: str, temperature, chunk: int, x_BTD, w_VD, target_BT, dlogp_BT, dentropy_BT):
  """-> (logp, entropy, dx, dw)"""

  def score(x_BTD, w_VD):
    return score_head(x_BTD, w_VD, target_BT, temperature, chunk=chunk, implementation=name)

  scores, pull = jax.vjp(score, x_BTD, w_VD)
  return *scores, *pull((dlogp_BT, dentropy_BT))


def run(name: str, arrays, temperature: float = 1.0, chunk: int = 48):
  found = both(name, temperature, chunk, *arrays)
  return [np.asarray(x.astype(jnp.promote_types(x.dtype, "float32"))) for x in found]


def expected(arrays, temperature: float = 1.0):
  with jax.enable_x64(True):
    widen = lambda x: jnp.asarray(np.asarray(x.astype("float32")), "float64")  # noqa: E731
    wide = [x if x.dtype == jnp.int32 else widen(x) for x in arrays]
    return run("reference", wide, temperature)


def assert_close(found, wanted, limits) -> None:
  for name, x, y in zip(NAMES, found, wanted, strict=True):
    assert np.isfinite(x).all(), name
    error = np.linalg.norm(x - y) / np.linalg.norm(y)
    assert error <= limits[name], (name, error)


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("name", FAST)
def test_values_and_gradients_are_those_of_the_reference(name, shape, dtype):
  """Of both scores with respect to both inputs, whatever the blocks divide."""
  arrays = draw(shape, dtype=dtype)
  assert_close(run(name, arrays, 0.8), expected(arrays, 0.8), LIMITS[dtype])


@pytest.mark.parametrize("name", ["reference", *FAST])
def test_a_frozen_head_gets_no_gradient_and_changes_no_other(name):
  """Scores and the tokens' gradient are the same; the head's is zero."""
  x_BTD, w_VD, target_BT, *cotangents = draw((1, 300, 128, 500))

  def run(frozen):
    def score(x_BTD, w_VD):
      how = {"chunk": 48, "frozen": frozen, "implementation": name}
      return score_head(x_BTD, w_VD, target_BT, 0.8, **how)

    scores, pull = jax.vjp(score, x_BTD, w_VD)
    return *scores, *pull(tuple(cotangents))

  *frozen, none = jax.jit(run, static_argnums=0)(True)
  *trained, some = jax.jit(run, static_argnums=0)(False)
  assert not none.any() and some.any()
  for x, y in zip(frozen, trained, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)


@settings(max_examples=8, deadline=None)
@given(st.data())
@pytest.mark.parametrize("name", FAST)
def test_any_temperature_chunk_and_targets(name, data):
  """The targets of a batch may all be one token, the first or the last."""
  arrays = list(draw((1, 130, 128, 300), seed=data.draw(st.integers(0, 99))))
  target = data.draw(st.sampled_from([None, 0, 299]))
  arrays[2] = arrays[2] if target is None else jnp.full_like(arrays[2], target)
  temperature = data.draw(st.floats(0.3, 3))
  found = run(name, arrays, temperature, data.draw(st.sampled_from([7, 130, 1000])))
  assert_close(found, expected(arrays, temperature), LIMITS["float32"])


@pytest.mark.parametrize("name", FAST)
def test_large_logits(name):
  """Of standard deviation 30, so that entropies are near 0, with one token far above all others."""
  arrays = list(draw((1, 300, 128, 500), std=30))
  arrays[1] = arrays[1].at[7].mul(4)
  found, wanted = run(name, arrays), expected(arrays)
  assert wanted[1].min() < 1e-9
  np.testing.assert_allclose(found[1], wanted[1], atol=5e-5)
  np.testing.assert_allclose(found[0], wanted[0], atol=2e-4, rtol=1e-6)
  assert_close(found, wanted, {"logp": 1e-6, "entropy": 5e-5, "dx": 5e-5, "dw": 5e-5})


def test_nothing_unwritten_is_read_and_nothing_races(monkeypatch):
  """The TPU's simulator: memory starts as nan, and accesses that are not ordered are reported.

  Blocks are whole here, since it cannot alias others. The plain interpreter, which runs elsewhere,
  has nan past the end of an array.
  """
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  how = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
  forward, backward = pallas_tpu.forward, pallas_tpu.backward
  monkeypatch.setattr(pallas_tpu, "forward", lambda _, *rest: forward(how, *rest))
  monkeypatch.setattr(pallas_tpu, "backward", lambda _, *rest: backward(how, *rest))
  arrays = draw((1, 300, 128, 384))
  found = [np.asarray(x) for x in both.__wrapped__("pallas_tpu", 0.8, 0, *arrays)]
  assert_close(found, expected(arrays, 0.8), LIMITS["float32"])
  assert not interpret_pallas_call.races.races_found


def test_the_same_bits_each_time():
  """The order of every sum is fixed."""
  arrays = draw(OFF_EVERY_BLOCK, dtype="bfloat16")
  first, second = (run("pallas_tpu", arrays) for _ in range(2))
  assert all((x == y).all() for x, y in zip(first, second, strict=True))


MESHES = [(8, 1, 1, 1), (2, 4, 1, 1), (2, 2, 2, 1), (1, 1, 8, 1), (2, 1, 1, 4), (1, 2, 2, 2)]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("B", [8, 3])
def test_a_mesh_changes_nothing(mesh, B):
  """Rows over all devices, vocabulary or tokens over some, and rows that do not divide."""
  data, fsdp, tensor, sequence = mesh
  arrays = draw((B, 20, 64, 96))

  @jax.jit
  def scores(x_BTD, w_VD, target_BT, *cotangents):
    score = lambda x, w: score_tokens(x, w, target_BT, 0.8, 8, False)  # noqa: E731
    out, pull = jax.vjp(score, x_BTD, w_VD)
    return *out, *pull(cotangents)

  with jax.set_mesh(make_mesh(data, fsdp, tensor, sequence=sequence)):
    found = [np.asarray(x) for x in scores(*arrays)]
  assert_close(found, expected(arrays, 0.8), LIMITS["float32"])


@pytest.mark.parametrize("rows", [1, 2])
def test_no_array_of_all_logits(rows):
  """In the compiled program, forward and backward, nothing is as large as [T, V]."""
  T, V, chunk = 640, 704, 64
  program = both.lower("xla", 0.8, chunk, *draw((rows, T, 32, V))).compile()
  shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", program.as_text())
  sizes = {np.prod([int(n) for n in shape.split(",")]) for shape in shapes}
  assert max(sizes) == rows * chunk * V
  assert program.memory_analysis().temp_size_in_bytes < 4 * rows * T * V / 2


def test_what_the_kernel_refuses():
  """One line that names the limit."""
  refused = functools.partial(score_head, chunk=8, implementation="pallas_tpu")
  with pytest.raises(NotImplementedError, match="width 96 is no multiple of 128"):
    refused(*draw((1, 8, 96, 64))[:3], 1.0)
  with pytest.raises(NotImplementedError, match="width 2560 in float32"):
    refused(*draw((1, 8, 2560, 8))[:3], 1.0)
  with pytest.raises(NotImplementedError, match="several devices"):
    refused(*draw((1, 8, 128, 64))[:3], 1.0, pin=lambda x, letters: x)
  with pytest.raises(ValueError, match="no implementation 'cudnn': choose auto, reference"):
    score_head(*draw((1, 8, 128, 64))[:3], 1.0, chunk=8, implementation="cudnn")
  assert set(FAST) | {"reference"} == set(IMPLEMENTATIONS)
