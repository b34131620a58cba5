"""README.md tells the truth: its tree is the tree, its commands parse, its links lead somewhere."""

import importlib
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMAND = re.compile(r"(?:\.venv/bin/)?python3? (?:-m qed_jax\.\w+|tools/\w+\.py)[^\n`#|]*")


def section(title: str) -> str:
  return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def tree() -> dict[str, str]:
  """{path: caption} of the tree in the README; folders end in a slash."""
  [block] = re.findall(r"```\n(.*?)```", section("The tree"), re.S)
  paths, above = {}, []
  for line in block.splitlines():
    name, caption = (line.strip().split(None, 1) + [""])[:2]
    above = above[: (len(line) - len(line.lstrip())) // 2]
    paths["".join(above) + name] = caption
    if name.endswith("/"):
      above.append(name)
  return paths


def commands() -> list[list[str]]:
  """Every program call on the page and in the demo, as words, without the interpreter."""
  dry = subprocess.run(
    ["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
  )
  found = COMMAND.findall(README) + COMMAND.findall(dry.stdout)
  return [shlex.split(c)[1:] for c in found]


def fields_of(config, prefix=""):
  for name, value in config.items():
    yield prefix + name
    if hasattr(value, "items"):
      yield from fields_of(value, f"{prefix}{name}.")


def mistakes(words: list[str]) -> list[str]:
  """What is wrong with a command: no such program, config, variant, field or flag."""
  if words[0] == "-m":
    path = ROOT / (words[1].replace(".", "/") + ".py")
    words = words[2:]
  else:
    path = ROOT / words[0]
    words = words[1:]
  if not path.is_file():
    return [f"{path.relative_to(ROOT)} is not there"]
  flags = dict((w.split("=", 1) + [""])[:2] for w in words if w.startswith("--"))
  source = path.read_text()
  own = set(re.findall(r'"(--[\w-]+)"', source))
  own |= {f"--{name}" for name in re.findall(r'DEFINE_\w+\("(\w+)"', source)}
  if "--config" not in flags or path.parent.name == "tools":
    return [f"{path.name} has no {flag}" for flag in flags if flag not in own]
  file, _, variant = flags["--config"].partition(":")
  if not (ROOT / file).is_file():
    return [f"{file} is not there"]
  try:
    config = importlib.import_module(file.removesuffix(".py").replace("/", ".")).get_config(variant)
  except ValueError as error:
    return [str(error)]
  known = {f"--config.{f}" for f in fields_of(config)} | {"--config", "--workdir"} | own
  return [f"{file} has no {flag}" for flag in flags if flag not in known]


def test_the_tree_is_there():
  """Every path of the README's tree exists, with a caption unless its files have theirs."""
  paths = tree()
  assert [p for p in paths if not (ROOT / p).exists()] == []
  bare = [p for p, caption in paths.items() if not caption]
  assert [p for p in bare if not any(q != p and q.startswith(p) for q in paths)] == []


def test_every_module_is_in_the_tree():
  """No module of the package, the configs or the tools is missing from the README."""
  folders = ("qed_jax", "configs", "tools")
  modules = {p for f in folders for p in (ROOT / f).rglob("*.py") if p.name != "__init__.py"}
  assert len(modules) > 30
  missing = sorted(p.relative_to(ROOT).as_posix() for p in modules)
  assert [p for p in missing if p not in tree()] == []


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words)[:70])
def test_commands_parse(words):
  """Each command names a program, a config, a variant, fields and flags that exist."""
  assert mistakes(words) == []


@pytest.mark.parametrize(
  "command",
  [
    "-m qed_jax.trian --config=configs/sft.py",
    "-m qed_jax.train --config=configs/stf.py",
    "-m qed_jax.train --config=configs/sft.py:tinny",
    "-m qed_jax.train --config=configs/sft.py:tiny --config.optimizer.learning_rate=1",
    "-m qed_jax.train --config=configs/sft.py:tiny --workdri=x",
    "-m qed_jax.report --workdri=x",
    "tools/nope.py",
  ],
)
def test_a_wrong_command_is_seen(command):
  """The check of this file would notice a misspelt program, config, variant, field or flag."""
  assert mistakes(command.split())


def test_make_targets_exist():
  """Each `make TARGET` on the page is a target."""
  calls = re.findall(r"(?:^|`)make ((?:[A-Z]+=\S+ )?)([a-z-]+)", README, re.M)
  makefile = (ROOT / "Makefile").read_text()
  assert len(calls) > 4
  assert [t for _, t in calls if not re.search(rf"^{t}:", makefile, re.M)] == []


def test_extras_exist():
  """Each [extra] that the page installs is in pyproject.toml, and so are the four promised ones."""
  extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
  named = set(re.findall(r"'\.\[(\w+)\]'", README)) | {"tpu", "cuda", "serve", "test"}
  assert named <= set(extras)


def test_links_lead_somewhere():
  """Pictures and links to files of the repository exist."""
  links = re.findall(r"\]\(([^)#]+)\)|<img[^>]* src=\"([^\"]+)\"", README)
  local = [a or b for a, b in links if "://" not in (a or b)]
  assert [link for link in local if not (ROOT / link).exists()] == []


def test_the_dimension_key_is_that_of_the_code():
  """Every letter of the sharding tables and of the parameters' dimensions is in the key."""
  from qed_jax import sharding
  from qed_jax.model.qwen3 import DIMS

  letters = set("".join(DIMS.values())) | set(sharding.WEIGHTS) | set(sharding.ACTIVATIONS)
  keyed = set(re.findall(r"\| ([A-Z]) \|", section("The dimension key")))
  assert letters <= keyed


def test_help_names_the_targets():
  """`make help` tells a newcomer of the targets that this page uses."""
  done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
  for target in ("demo", "test", "lint"):
    assert f"make {target}" in done.stdout
