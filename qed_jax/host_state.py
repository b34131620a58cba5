"""Host values as JSON under a CRC32: what a checkpoint holds beside its arrays."""

import base64
import json
import zlib

import jax.numpy as jnp
import numpy as np


def seal(manifest) -> dict:
  """What `unseal` gives back unless a byte of it has changed."""
  text = json.dumps(manifest)
  return {"crc32": zlib.crc32(text.encode()), "text": text}


def unseal(document) -> dict:
  """The sealed values. Raises ValueError when they are not what was sealed."""
  if zlib.crc32(document["text"].encode()) != document["crc32"]:
    raise ValueError("the host state is not what was saved")
  return json.loads(document["text"])


def encode(value, where: str):
  """JSON for a host value; arrays and bytes become {"__array__" | "__bytes__": ...}.

  where: the value's name in errors. Raises TypeError for what would not come back as it is.
  """
  if isinstance(value, np.ndarray | np.generic):
    if value.dtype.kind not in "biufcV" or value.dtype.fields:
      raise TypeError(f"{where} is a numpy array of {value.dtype}: only numbers can be stored")
    data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
    return {"__array__": [value.dtype.name, list(value.shape), data]}
  if value is None or isinstance(value, bool | int | float | str):
    return value
  if isinstance(value, bytes):
    return {"__bytes__": base64.b64encode(value).decode()}
  if isinstance(value, list | tuple):
    return [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
  if isinstance(value, dict):
    for key in value:
      if not isinstance(key, str) or key in ("__array__", "__bytes__"):
        raise TypeError(f"{where} has the key {key!r}: keys must be plain strings")
    return {key: encode(item, f"{where}.{key}") for key, item in value.items()}
  raise TypeError(f"{where} is a {type(value).__name__}, which JSON cannot hold")


def decode(value):
  """The inverse of `encode`; tuples come back as lists."""
  if isinstance(value, list):
    return [decode(item) for item in value]
  if not isinstance(value, dict):
    return value
  if "__bytes__" in value:
    return base64.b64decode(value["__bytes__"])
  if "__array__" in value:
    dtype, shape, data = value["__array__"]
    array = np.frombuffer(bytearray(base64.b64decode(data)), jnp.dtype(dtype)).reshape(shape)
    return array if shape else array[()]
  return {key: decode(item) for key, item in value.items()}
