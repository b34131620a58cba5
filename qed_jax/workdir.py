"""The files that say whose a workdir is: which config, which versions, which machine."""

import json
import os
import shutil
import subprocess
import sys
import time
from importlib import metadata

import jax
from etils import epath

from qed_jax import hosts

SHARED_S = 10
PACKAGES = "qed_jax jax jaxlib flax optax orbax-checkpoint grain transformers numpy".split()


def write_run_files(workdir: str | os.PathLike, config: dict) -> None:
  """Writes `config.json` and `env.json` (versions, devices, git commit; never the environment)."""
  if jax.process_index() != 0:
    return
  workdir = epath.Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  devices = jax.devices()
  env = {
    "python": sys.version.split()[0],
    "packages": {name: _version(name) for name in PACKAGES},
    "platform": devices[0].platform,
    "device_kind": devices[0].device_kind,
    "devices": len(devices),
    "processes": jax.process_count(),
    "git": _git_commit(),
  }
  for name, content in (("config.json", config), ("env.json", env)):
    unfinished = workdir / f"{name}.tmp"
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    unfinished.replace(workdir / name)


def check_same_on_hosts(workdir: str, config: dict) -> None:
  """Raises ValueError, one line, where hosts were started with different configs or code."""
  if hosts.count() == 1:
    return
  versions = {name: _version(name) for name in PACKAGES} | {"python": sys.version.split()[0]}
  hosts.agree(
    {"--workdir": os.fspath(workdir), **_fields(json.loads(json.dumps(config)))},
    "start the same command on every host",
  )
  hosts.agree(versions, "install the same versions on every host")
  hosts.agree({"the code's git commit": _git_commit()}, "check out the same commit on every host")


def check_shared(workdir: str | os.PathLike) -> None:
  """Raises ValueError, one line, unless every host sees what host 0 has written there."""
  hosts.gather(None)  # host 0 comes here when it has written
  path = epath.Path(workdir) / "env.json"
  for _ in range(SHARED_S):  # network folders show new files late
    if path.exists():
      break
    time.sleep(1)
  blind = [host for host, sees in enumerate(hosts.gather(path.exists())) if not sees]
  if blind:
    raise ValueError(
      f"host {blind[0]} does not see what host 0 wrote to {epath.Path(workdir)}: give all hosts "
      "one workdir, in a bucket (gs://...) or on a shared file system"
    )


# Fields that the program had not yet when an old workdir was made, and what their absence means.
ADDED = {
  "mesh.sequence": "1",
  "profile.steps": "[]",
  "lora.rank": "0",
  "lora.alpha": "32.0",
  "lora.targets": '"all-linear"',
  "lora.sampler": '"unmerged"',
}


def check_same_config(
  workdir: str | os.PathLike, config: dict, ignore: tuple[str, ...] = ()
) -> None:
  """Raises ValueError with the differing fields if another config owns the workdir.

  ignore: dotted fields, or prefixes of them, that may differ.
  """
  path = epath.Path(workdir) / "config.json"
  if not path.exists():
    return
  try:
    theirs = _fields(json.loads(path.read_text()))
  except ValueError as error:
    raise ValueError(f"{path} is not JSON ({error}); use another workdir") from error
  ours = _fields(json.loads(json.dumps(config)))
  theirs = {name: value for name, value in ADDED.items() if name in ours} | theirs
  differ = []
  for name in sorted(theirs.keys() | ours.keys()):
    if any(name == field or name.startswith(f"{field}.") for field in ignore):
      continue
    old, new = theirs.get(name, "absent"), ours.get(name, "absent")
    if old != new:
      differ.append(f"{name}: {old} there, {new} here")
  if differ:
    raise ValueError(
      f"workdir {epath.Path(workdir)} belongs to a run with another config ({'; '.join(differ)}); "
      "use another --workdir, or that config to resume"
    )


def _fields(tree, prefix=""):
  """{"optim.peak_lr": "0.001"}: the leaves as JSON text, so that 1, 1.0 and true are three."""
  if not isinstance(tree, dict) or (not tree and prefix):
    return {prefix: json.dumps(tree)}
  fields = {}
  for name, value in tree.items():
    fields |= _fields(value, f"{prefix}.{name}" if prefix else name)
  return fields


def _version(package: str) -> str | None:
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return None


def _git_commit() -> str | None:
  """The commit this code runs from, "+" appended when files differ; None outside a repository."""
  git, folder = shutil.which("git"), os.path.dirname(os.path.abspath(__file__))
  if git is None:
    return None

  def ask(*arguments):
    # Fixed arguments and a full path: nothing here comes from a user.
    return subprocess.run(  # noqa: S603
      [git, "-C", folder, *arguments], capture_output=True, text=True, timeout=30, check=False
    )

  if ask("ls-files", "--error-unmatch", os.path.basename(__file__)).returncode != 0:
    return None  # installed somewhere inside another repository
  changed = ask("status", "--porcelain", "--untracked-files=no").stdout.strip()
  return ask("rev-parse", "HEAD").stdout.strip() + ("+" if changed else "")
