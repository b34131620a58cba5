"""Checksums of arrays that do not depend on how they are sharded, taken where the arrays are.

A checksum is a sum over the elements of a 32-bit mix of the element's bits and its global position.
Any change of one element changes it; a larger change goes unseen with probability 2^-32, as with a
CRC32.
"""

import hashlib
import json
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils


def checksums(arrays: dict[str, jax.Array]) -> dict[str, int]:
  """Checksum of each array over all its elements, on all processes; independent of sharding."""
  partial = []
  for array in arrays.values():
    # Row-major strides of the whole array; positions are taken modulo 2^32.
    strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
    strides_32 = np.array([stride % 2**32 for stride in strides], np.uint32)
    sums = []
    for shard in array.addressable_shards:
      if shard.replica_id == 0:
        starts = [part.start or 0 for part in shard.index]
        offset = sum(map(operator.mul, starts, strides)) % 2**32
        sums.append(_shard_sum(shard.data, strides_32, np.uint32(offset)))
    partial.append(sums)
  totals = np.array([sum(map(int, sums)) % 2**32 for sums in jax.device_get(partial)], np.uint32)
  if jax.process_count() > 1:
    gathered = multihost_utils.process_allgather(totals)
    totals = gathered.astype(np.uint64).sum(0) % 2**32
  return dict(zip(arrays, map(int, totals), strict=True))


def fingerprint(arrays: dict[str, jax.Array]) -> str:
  """16 hex digits that stand for names, dtypes, shapes and contents; the same on every mesh."""
  sums = checksums(arrays)
  entries = [[name, str(x.dtype), list(x.shape), sums[name]] for name, x in arrays.items()]
  return hashlib.sha256(json.dumps(sorted(entries)).encode()).hexdigest()[:16]


@jax.jit
def _shard_sum(x, strides, offset):
  """uint32 sum of mix(bits, position) over one shard; exact, so the order of adding is free."""
  position = jnp.broadcast_to(offset, x.shape)
  for axis in range(x.ndim):
    position += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * strides[axis]
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  info = jnp.finfo if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo
  bits = jax.lax.bitcast_convert_type(x, f"uint{info(x.dtype).bits}")
  words = [bits.astype(jnp.uint32)]
  if bits.dtype == jnp.uint64:
    words.append((bits >> 32).astype(jnp.uint32))
  total = jnp.uint32(0)
  for half, word in enumerate(words):
    # The finaliser of MurmurHash3 (public domain): for a fixed position a bijection of the word.
    h = word + position * jnp.uint32(0x9E3779B1) + jnp.uint32(half * 0x7F4A7C15 + 1)
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    total += jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)
  return total
