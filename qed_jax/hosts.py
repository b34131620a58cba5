"""The hosts of a run: how they find one another, agree, and end together.

One process runs on every host. They talk through the key-value service that jax.distributed starts
beside process 0. No device takes part, so an engine goes on sampling while its host waits, and a
host that waits still sees SIGTERM and the failures of others. On one host everything here is free.
"""

import atexit
import ctypes
import glob
import importlib.util
import itertools
import json
import math
import os
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax

PREFIX, DONE = "qed_jax", "done"
POLL_MS = 500  # how soon a waiting host sees that another one stops
LINGER_S = 2.0  # process 0 holds the service: the others read from it why the run ends
JOIN_S = 300  # for all hosts to come
ALL = "run the same command on every host, with one coordinator and as many processes as hosts"
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
ENVIRONMENT = {
  "coordinator": "JAX_COORDINATOR_ADDRESS",
  "processes": "JAX_NUM_PROCESSES",
  "process_id": "JAX_PROCESS_ID",
}
ARGUMENTS = {  # jax's names for the same
  "coordinator": "coordinator_address",
  "processes": "num_processes",
  "process_id": "process_id",
}
AGAIN = "the newest checkpoint is whole: run the same command on every host to go on from it"

_meetings = itertools.count()
_on_abort: list = []


class Lost(Exception):
  """Another host is gone or has given up: this one ends too, with one line."""


# --- joining


def settings(environ: Mapping[str, str], given: Mapping[str, Any]) -> dict | None:
  """Arguments of jax.distributed.initialize; None for a run on one host.

  given: coordinator, processes and process_id from the command line, None where not given. They and
  the JAX_* variables go before Slurm's, Slurm's before the TPU's metadata. Raises ValueError, one
  line, where two sources disagree or something is missing.
  """
  found: dict[str, tuple[str, Any]] = {}
  slurm = _slurm(environ) if given["processes"] != 1 else {}
  for name, variable in ENVIRONMENT.items():
    told = {f"--{name}": given[name], variable: environ.get(variable), **slurm.get(name, {})}
    told = {source: value for source, value in told.items() if value not in (None, "")}
    if name != "coordinator":
      told = {source: _number(source, value) for source, value in told.items()}
    for source, value in told.items():
      first = next(iter(told))
      if value != told[first]:
        raise ValueError(f"{first} is {told[first]} and {source} is {value}: give one, or the same")
      found.setdefault(name, (source, value))
  values = {name: value for name, (_, value) in found.items()}
  if values.get("processes") == 1:
    return None
  if slurm:
    extra = _gpus_of_a_task(environ)
    return _checked(values) | extra if "coordinator" in values else {**extra}
  if values:
    missing = [name for name in ENVIRONMENT if name not in values]
    if missing and _tpu_hosts(environ) > 1:
      return {ARGUMENTS[name]: value for name, value in values.items()}
    if missing:
      sources = " and ".join(source for source, _ in found.values())
      ways = " and ".join(f"--{name} (or {ENVIRONMENT[name]})" for name in missing)
      raise ValueError(f"{sources} without the rest: give {ways} too")
    return _checked(values)
  return {} if _tpu_hosts(environ) > 1 else None


def _checked(values: dict) -> dict:
  address, processes, process = (values[name] for name in ENVIRONMENT)
  if not address.rpartition(":")[2].isdigit():
    raise ValueError(f"the coordinator's address is {address!r}: give HOST:PORT of process 0")
  if not 0 <= process < processes:
    raise ValueError(f"process_id is {process} of {processes} processes: they count from 0")
  return {ARGUMENTS[name]: values[name] for name in ENVIRONMENT}


def _number(source: str, value) -> int:
  try:
    return int(value)
  except ValueError:
    raise ValueError(f"{source} is {value!r}: give a whole number") from None


def _slurm(environ) -> dict[str, dict]:
  """What a Slurm step of several tasks says, by field and by variable; {} outside of one."""
  if int(environ.get("SLURM_NTASKS", "1")) < 2:
    return {}
  if "SLURM_STEP_NODELIST" not in environ:
    raise ValueError(
      f"SLURM_NTASKS is {environ['SLURM_NTASKS']} and this is no step of it: start the command "
      "with srun, or give --processes=1"
    )
  return {
    "processes": {"SLURM_NTASKS": environ["SLURM_NTASKS"]},
    "process_id": {"SLURM_PROCID": environ.get("SLURM_PROCID")},
  }


def _gpus_of_a_task(environ) -> dict:
  """One task a node has all GPUs of the node; jax would give every Slurm task a single one."""
  gpus = environ.get("SLURM_GPUS_ON_NODE", "")
  alone = environ.get("SLURM_STEP_NUM_NODES") == environ["SLURM_NTASKS"]
  return {"local_device_ids": list(range(int(gpus)))} if alone and gpus.isdigit() else {}


def _tpu_hosts(environ) -> int:
  """Hosts of the TPU slices that this machine is part of, 1 where there is no TPU."""
  if environ.get("MEGASCALE_COORDINATOR_ADDRESS"):
    return 2  # several slices, whatever their size
  names = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
  if names:
    return len(names.split(","))
  chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
  skip = "TPU_SKIP_MDS_QUERY" in environ or environ.get("JAX_PLATFORMS", "tpu").find("tpu") < 0
  if skip or not chips or importlib.util.find_spec("libtpu") is None:
    return 1
  # A TPU VM has no variable that names the other workers; jax asks the metadata server, too.
  request = urllib.request.Request(  # noqa: S310
    METADATA + "worker-network-endpoints", headers={"Metadata-Flavor": "Google"}
  )
  try:
    with urllib.request.urlopen(request, timeout=5) as reply:  # noqa: S310
      return len(reply.read().decode().split(","))
  except OSError:
    return 1


def join(given: Mapping[str, Any], heartbeat_s: int) -> None:
  """Joins the other hosts, where there are any. Call it before anything asks for a device.

  given: as for `settings`. heartbeat_s: a host that was not heard of for so long is given up, and
  the others end. Raises ValueError, one line, when the hosts do not come together.
  """
  arguments = settings(os.environ, given)
  if arguments is None or jax.distributed.is_initialized():
    return
  if arguments.get("process_id") == 0:
    _check_port(arguments["coordinator_address"])
  jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is train.py's
  # Where hosts stay away or end, jax ends a process with a stack trace; here a line comes before.
  late = threading.Timer(JOIN_S, _end_from_thread, [f"not all hosts came within {JOIN_S} s: {ALL}"])
  late.daemon = True
  late.start()
  try:
    jax.distributed.initialize(
      **arguments,
      initialization_timeout=2 * JOIN_S,
      heartbeat_timeout_seconds=heartbeat_s + 5,
    )
  except (RuntimeError, ValueError) as error:
    raise ValueError(f"the hosts did not come together: {_first_line(error)}; {ALL}") from None
  finally:
    late.cancel()
  _say_so_on_abort()
  ended = threading.Event()
  watch = threading.Thread(
    target=_watch, args=(_client(), heartbeat_s, ended), name="other hosts", daemon=True
  )
  watch.start()

  def finish():
    """This host is done: the others need not hear of it any more."""
    ended.set()
    watch.join()  # a thread that the interpreter's end finds in a call of C++ aborts the process
    _client().key_value_set(f"{PREFIX}/alive/{index()}", DONE, allow_overwrite=True)

  atexit.register(finish)  # runs before jax leaves the others


def _check_port(address: str) -> None:
  port = int(address.rpartition(":")[2])
  with socket.socket() as trial:
    trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      trial.bind(("", port))
    except OSError as error:
      raise ValueError(f"port {port} of {address}: {error.strerror}; give a free one") from None


def count() -> int:
  """Hosts of this run. Asks for no device."""
  return _state().num_processes if _client() is not None else 1


def index() -> int:
  """Which of them this is."""
  return _state().process_id if _client() is not None else 0


def _state():
  # No public name leads to the service; Orbax and Flax take the same way.
  return jax._src.distributed.global_state


def _client():
  return _state().client


# --- meeting


def gather(value, waiting: Callable[[], Any] = lambda: None) -> list:
  """Everybody's `value`, in the order of hosts; each host calls this as often as the others.

  value: what JSON holds. waiting: called twice a second until all are there. Raises Lost, one line,
  once another host has failed.
  """
  client, hosts = _client(), count()
  if hosts == 1:
    return [value]
  number = next(_meetings)
  folder = f"{PREFIX}/meeting/{number}/"
  client.key_value_set(f"{folder}{index()}", json.dumps(value))
  while True:
    found = dict(client.key_value_dir_get(folder))
    missing = [i for i in range(hosts) if f"{folder}{i}" not in found]
    if not missing:
      break
    _raise_failure()
    waiting()
    _wait_for(f"{folder}{missing[0]}", POLL_MS)
  if index() == 0 and number:  # who is here has read what was said before
    client.key_value_delete(f"{PREFIX}/meeting/{number - 1}/")
  return [json.loads(found[f"{folder}{i}"]) for i in range(hosts)]


def totals(*numbers: float) -> list[float]:
  """Each number's sum over the hosts."""
  return [sum(column) for column in zip(*gather(list(numbers)), strict=True)]


def agree(fields: Mapping[str, Any], fix: str) -> None:
  """Raises ValueError, the same line on every host, on the first field that two hosts differ in.

  fields: names and values that JSON holds. fix: what the line ends with.
  """
  everyone = gather(dict(fields))
  for name in sorted(set().union(*everyone)):
    first = everyone[0].get(name, "absent")
    for host, theirs in enumerate(everyone):
      if theirs.get(name, "absent") != first:
        raise ValueError(
          f"the hosts disagree: {name} is {first} on host 0 and {theirs.get(name, 'absent')} on "
          f"host {host}: {fix}"
        )


def stopping(seen: Callable[[], bool]) -> Callable[[], bool]:
  """Whether `seen` is true here or was on any host; asks the others once in POLL_MS."""
  if count() == 1:
    return seen
  folder, client = f"{PREFIX}/stop/", _client()
  asked, stop = 0.0, False

  def stopped() -> bool:
    nonlocal asked, stop
    if not stop and seen():
      client.key_value_set(f"{folder}{index()}", "1", allow_overwrite=True)
      stop = True
    now = time.monotonic()
    if not stop and now - asked > POLL_MS / 1000:
      asked, stop = now, bool(client.key_value_dir_get(folder))
    return stop

  return stopped


# --- ending


def lost(error: BaseException) -> Lost | None:
  """What an error means when it comes of a collective operation whose other side is gone."""
  text = _first_line(error)
  if isinstance(error, Lost):
    return error
  signs = ("Gloo", "NCCL", "UNAVAILABLE", "coordination service")
  if count() == 1 or not any(sign in text for sign in signs):
    return None
  return Lost(f"host {index()} of {count()} has lost another host ({text[:120]}): {AGAIN}")


def fail(line: str, code: int) -> NoReturn:
  """Ends this process at once, and tells the other hosts why."""
  client = _client()
  try:
    client.key_value_set(f"{PREFIX}/failed/{index()}", line, allow_overwrite=True)
    client.key_value_set(f"{PREFIX}/alarm", line)
  except RuntimeError:  # the service is gone, or another host was first
    pass
  if index() == 0:
    time.sleep(LINGER_S)
  # Not sys.exit: jax would wait at its end for hosts that may be gone.
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def _raise_failure() -> None:
  failed = dict(_client().key_value_dir_get(f"{PREFIX}/failed/"))
  for key, line in sorted(failed.items()):
    if key != f"{PREFIX}/failed/{index()}":
      raise Lost(f"host {key.rsplit('/', 1)[1]} of {count()} stopped: {line}")


def _wait_for(key: str, timeout_ms: int) -> bool:
  """Whether the key is there before the time is over."""
  try:
    _client().blocking_key_value_get(key, timeout_ms)
  except jax.errors.JaxRuntimeError as error:
    if "DEADLINE_EXCEEDED" in str(error):
      return False
    raise
  return True


def _watch(client, heartbeat_s: int, ended: threading.Event) -> None:
  """A thread: says that this host is alive, and ends the process when another one no longer is."""
  heard: dict[str, tuple[str, float]] = {}
  beat, now = 0, -math.inf
  while not ended.is_set():
    try:
      if _wait_for(f"{PREFIX}/alarm", POLL_MS):
        time.sleep(2 * LINGER_S)  # the main thread says the same, unless a device holds it
        _raise_failure()
        return
      if time.monotonic() - now < heartbeat_s / 5:
        continue
      beat, now = beat + 1, time.monotonic()
      client.key_value_set(f"{PREFIX}/alive/{index()}", str(beat), allow_overwrite=True)
      alive = dict(client.key_value_dir_get(f"{PREFIX}/alive/"))
    except Lost as error:
      _end_from_thread(str(error))
    except RuntimeError:
      _end_from_thread(f"host 0 of {count()}, which coordinates the others, is gone: {AGAIN}")
    for key, value in alive.items():
      if heard.get(key, ("", 0))[0] != value:
        heard[key] = value, now
      elif value != DONE and now - heard[key][1] > heartbeat_s:
        host = key.rsplit("/", 1)[1]
        _end_from_thread(f"host {host} of {count()} was not heard of for {heartbeat_s} s: {AGAIN}")


def _say_so_on_abort() -> None:
  """A line where jax ends the process itself: it does so as soon as host 0 is gone."""
  line = (
    f"host {index()} of {count()} was ended by jax (above; host 0 is gone, most likely): {AGAIN}"
  )

  @ctypes.CFUNCTYPE(None, ctypes.c_int)
  def say(_):  # the C library's handler: Python's would not run before abort() ends the process
    _end_from_thread(line)

  _on_abort.append(say)  # C holds no reference
  ctypes.CDLL(None).signal(signal.SIGABRT, say)


def _end_from_thread(line: str) -> NoReturn:
  os.write(2, f"error: {line}\n".encode())
  os._exit(1)


def _first_line(error: BaseException) -> str:
  return " ".join(str(error).split("\n")[0].split()) or type(error).__name__
