"""Checksums of arrays: the same on every layout, another for every change."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from qed_jax.checksums import checksums


def test_checksum_ignores_sharding_and_sees_order():
  """One checksum on every layout of 1, 2, 4 and 8 devices; swapped elements change it."""
  x = jax.random.normal(jax.random.key(0), (8, 16, 3)).astype(jnp.bfloat16)
  expected = checksums({"x": x})["x"]
  devices = jax.devices()
  for count in (n for n in (1, 2, 4, 8) if n <= len(devices)):
    mesh = jax.sharding.Mesh(np.array(devices[:count]).reshape(count, 1), ("a", "b"))
    for spec in ((), ("a",), (None, "a"), ("b", "a"), (("a", "b"),)):
      placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
      assert checksums({"x": placed})["x"] == expected, (count, spec)
  swapped = x.at[0, 0, 0].set(x[0, 0, 1]).at[0, 0, 1].set(x[0, 0, 0])
  assert checksums({"x": swapped})["x"] != expected
  assert checksums({"x": -x})["x"] != expected
  assert checksums({"x": -jnp.zeros(3)}) != checksums({"x": jnp.zeros(3)})
