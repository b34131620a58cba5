"""Attention over rows whose tokens are split over devices: two ways to exchange what it needs.

  heads   All-to-all (Ulysses): a device gets whole rows of a share of its heads, and gives back a
          share of the tokens. The key heads of a device must divide into the shares.
  tokens  Keys and values are gathered and queries stay apart, for any number of heads. Late queries
          see more than early ones: each device trades the late half of its queries with the device
          opposite, so that all have the same work.

Both run inside shard_map, for a share [B, T, heads, H] of a device; what comes back is the same sum
in the same order whatever the timing. attend(q_BTNH, k_BSKH, v_BSKH, rows) -> o_BTNH is attention
of queries that are the last T of the S keys.
"""

import jax
import jax.numpy as jnp


def bytes_received(q_bytes: int, k_bytes: int, shares: int) -> dict[str, int]:
  """What a device receives in a forward pass, by way; backward it is the same again.

  q_bytes, k_bytes: of a device's share of the queries and of the keys; values are like keys, and
  outputs like queries. All-to-all keeps one share of each of the four and receives shares - 1;
  gathering receives the keys and values of all other devices, and half of the queries and outputs.
  """
  return {
    "heads": (2 * q_bytes + 2 * k_bytes) * (shares - 1) // shares,
    "tokens": 2 * k_bytes * (shares - 1) + q_bytes,
  }


def by_heads(attend, axis: str, q_BTNH, k_BTKH, v_BTKH, rows):
  """-> o_BTNH. rows: of the whole rows."""
  whole = lambda x: jax.lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)  # noqa: E731
  o_BSnH = attend(whole(q_BTNH), whole(k_BTKH), whole(v_BTKH), rows)
  return jax.lax.all_to_all(o_BSnH, axis, split_axis=1, concat_axis=2, tiled=True)


def by_tokens(attend, axis: str, q_BTNH, k_BTKH, v_BTKH, rows):
  """-> o_BTNH. rows: two, of the pieces that `trade` leaves a device with."""
  k_BSKH, v_BSKH = (jax.lax.all_gather(x, axis, axis=1, tiled=True) for x in (k_BTKH, v_BTKH))
  early, late = (
    attend(q_BTNH, until(k_BSKH, end), until(v_BSKH, end), rows_of_piece)
    for (q_BTNH, end), rows_of_piece in zip(trade(q_BTNH, axis), rows, strict=True)
  )
  return jnp.concatenate([early, opposite(late, axis)], axis=1)


def trade(x_BT, axis: str):
  """The two pieces of a row that a device attends from, and the token before which each ends."""
  half = x_BT.shape[1] // 2
  own, shares = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
  early, late = x_BT[:, :half], opposite(x_BT[:, half:], axis)
  return (early, (2 * own + 1) * half), (late, (2 * shares - 2 * own) * half)


def opposite(x, axis: str):
  """The x of the device as far from the end as this one is from the beginning."""
  shares = jax.lax.axis_size(axis)
  return jax.lax.ppermute(x, axis, [(i, shares - 1 - i) for i in range(shares)])


def until(x_BSKH, end):
  """The S tokens that end before `end`, those before the row being zeros.

  The queries of a piece are then the last ones on every device: kernels know where they are when
  they are compiled, and nothing later than them is in sight.
  """
  S = x_BSKH.shape[1]
  padded = jnp.pad(x_BSKH, ((0, 0), (S, 0), (0, 0), (0, 0)))
  return jax.lax.dynamic_slice_in_dim(padded, end, S, axis=1)
