"""Host state as sealed JSON: what goes in comes out, and a changed byte is an error."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qed_jax.host_state import decode, encode, seal, unseal

NUMBERS = hnp.scalar_dtypes().filter(lambda d: d.kind in "biuf" and d.isnative and d.itemsize <= 8)
LEAVES = (
  st.none()
  | st.booleans()
  | st.integers()
  | st.floats(allow_nan=False)
  | st.text()
  | st.binary()
  | hnp.arrays(NUMBERS, hnp.array_shapes(min_dims=0, max_side=3))
)
STATES = st.dictionaries(
  st.text(),
  st.recursive(LEAVES, lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=8),
)


def assert_same(a, b):
  if isinstance(a, dict):
    assert a.keys() == b.keys()
    for key in a:
      assert_same(a[key], b[key])
  elif isinstance(a, list):
    for x, y in zip(a, b, strict=True):
      assert_same(x, y)
  elif isinstance(a, np.ndarray):
    assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, np.shape(b), b.tobytes())
  else:
    assert type(a) is type(b) and a == b


@given(STATES)
def test_what_goes_in_comes_out(state):
  """Through JSON text too, as on disk: types, dtypes, shapes and bits."""
  document = json.loads(json.dumps(seal(encode(state, "state"))))
  assert_same(state, decode(unseal(document)))


@given(st.binary(min_size=1), st.data())
def test_a_changed_character_is_an_error(value, data):
  document = seal(encode({"value": value}, "state"))
  at = data.draw(st.integers(0, len(document["text"]) - 1))
  other = data.draw(st.characters(codec="ascii").filter(lambda c: c != document["text"][at]))
  text = document["text"][:at] + other + document["text"][at + 1 :]
  with pytest.raises(ValueError, match="not what was saved"):
    unseal(document | {"text": text})
