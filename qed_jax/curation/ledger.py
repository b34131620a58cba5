"""What a job has finished, by key, in an append-only JSONL file that outlives a kill -9."""

import contextlib
import fcntl
import json
import os
import pathlib
import threading
from typing import Any


class Ledger:
  """Records by key. A record is on disk (fsync) when `add` returns; the last one of a key counts.

  Memory holds an offset a record. A line torn by a kill is passed over and its work done again.
  Threads may share it, processes may not: a second one that opens the file is told so.
  """

  def __init__(self, path: str | os.PathLike):
    """Raises ValueError in one line when another process has the file open."""
    self.path = pathlib.Path(path)
    self.path.parent.mkdir(parents=True, exist_ok=True)
    self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      os.close(self._file)
      raise ValueError(
        f"another process works in {self.path.parent}: wait for it or use another --workdir"
      ) from error
    self._lock = threading.Lock()
    self._spans: dict[str, tuple[int, int]] = {}
    start, line = 0, b"\n"
    with self.path.open("rb") as lines:
      for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
          self._spans[json.loads(line)["key"]] = (start, len(line))
        start += len(line)
    self._torn = not line.endswith(b"\n")

  def __contains__(self, key: str) -> bool:
    return key in self._spans

  def __len__(self) -> int:
    return len(self._spans)

  def __getitem__(self, key: str) -> dict[str, Any]:
    length, start = self._spans[key][1], self._spans[key][0]
    return json.loads(os.pread(self._file, length, start))["record"]

  def add(self, key: str, record: dict[str, Any]) -> None:
    """Raises OSError when the disk refuses: to go on would be to pay for what is then lost."""
    line = json.dumps({"key": key, "record": record}).encode() + b"\n"
    with self._lock:
      data = b"\n" + line if self._torn else line
      self._torn = True
      if os.write(self._file, data) < len(data):
        raise OSError(f"{self.path} took only part of a line: is the disk full?")
      self._torn = False
      end = os.lseek(self._file, 0, os.SEEK_END)
      self._spans[key] = (end - len(line), len(line))
    os.fsync(self._file)

  def close(self) -> None:
    """Closes the file, which lets another process have it."""
    os.close(self._file)

  def __enter__(self) -> "Ledger":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()
