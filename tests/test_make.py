"""The Makefile, with an interpreter that only writes down what it is asked to do."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = ("Makefile", "pyproject.toml", "constraints.txt")

# Answers the Makefile's questions as Python {version} would, makes environments out of copies of
# itself, and notes every other command in {log}.
FAKE = """#!/bin/sh
case "$1 $2" in
  "-c "*)
    exec {real} -c "import sys; sys.version_info = ({version}, 0, 'final', 0)
$2" ;;
  "-m venv")
    echo "venv" >> {log}
    mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
  *) echo "$@" >> {log} ;;
esac
"""


@pytest.fixture
def make(tmp_path):
  """make(*arguments, version="3.11") -> (process, the commands that the interpreter was given)."""
  for name in FILES:
    shutil.copy(ROOT / name, tmp_path)
  log = tmp_path / "log"

  def run(*arguments, version="3.11", name="python3"):
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    fake = folder / name
    text = FAKE.format(real=shutil.which("python3"), version=version.replace(".", ", "), log=log)
    fake.write_text(text)
    fake.chmod(0o755)
    log.write_text("")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    env["PATH"] = f"{folder}{os.pathsep}{env['PATH']}"
    done = subprocess.run(
      ["make", *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    return done, log.read_text().splitlines()

  return run


def installs(commands: list[str]) -> list[str]:
  return [c for c in commands if "pip install" in c]


def test_set_up_happens_once(make, tmp_path):
  """The second time nothing is installed; with another pyproject.toml or other pins it is again."""
  done, commands = make("setup")
  assert done.returncode == 0, done.stderr
  assert commands[0] == "venv" and len(installs(commands)) == 2
  assert installs(commands)[1].endswith("--editable .[test]")
  assert make("setup")[1] == []
  for name in ("pyproject.toml", "constraints.txt"):
    later = time.time() + 1
    os.utime(tmp_path / name, (later, later))
    done, commands = make("setup")
    assert len(installs(commands)) == 2 and "venv" not in commands, name
    time.sleep(1.1)  # a stamp must be younger than the file
    make("setup")
    assert make("setup")[1] == []


def test_a_failed_installation_is_not_taken_for_done(make, tmp_path):
  """Without a stamp the next call installs again."""
  make("setup")
  stamp = tmp_path / ".venv" / ".base-3.11"
  assert stamp.exists()
  stamp.unlink()
  (tmp_path / ".venv/bin/python").write_text(
    "#!/bin/sh\ncase $1 in -c) exit 0;; *) exit 3;; esac\n"
  )
  done, _ = make("setup")
  assert done.returncode != 0 and not stamp.exists()


def test_the_demo_needs_no_test_tools(make):
  """The demo installs the program alone: no torch, no pytest."""
  _, commands = make("demo")
  assert [c.split("--editable ")[1] for c in installs(commands)] == ["."]


def test_the_demo_trains_three_stages_then_evaluates_then_reports(make):
  """Both RL stages start from SFT; the untrained model is evaluated too."""
  _, commands = make("demo", "DEMO=runs/x")
  runs = [c for c in commands if c.startswith("-m qed_jax.")]
  assert [re.match(r"-m qed_jax\.(\w+)", c)[1] for c in runs] == (
    ["train"] * 3 + ["evaluate"] * 4 + ["report"]
  )
  assert "--config.init" not in runs[0]
  assert all("--config.init=runs/x/sft" in run for run in runs[1:3])
  assert "--config.untrained=True" in runs[3]
  assert runs[-1] == "-m qed_jax.report --workdir=runs/x"


def test_pins_belong_to_the_oldest_interpreter(make):
  """3.11 gets the pins; newer ones the newest releases, in an environment of their own."""
  assert all("--constraint constraints.txt" in c for c in installs(make("setup")[1]))
  done, commands = make("setup", "PYTHON=python3.12", version="3.12", name="python3.12")
  assert done.returncode == 0, done.stderr
  assert commands[0] == "venv" and len(installs(commands)) == 2
  assert not any("--constraint" in c for c in commands)


def test_environments_do_not_mix(make, tmp_path):
  """Another interpreter leaves .venv alone; a python3 of another version makes .venv anew."""
  make("setup")
  make("setup", "PYTHON=python3.12", version="3.12", name="python3.12")
  assert (tmp_path / ".venv-3.12/bin/python").exists()
  assert make("setup")[1] == []
  assert make("setup", version="3.13")[1][0] == "venv"


@pytest.mark.parametrize("target", ["setup", "demo", "test", "lint"])
def test_an_old_interpreter_is_one_line(make, target):
  """Python 3.10 is refused with what is needed, what is there, and what to type."""
  done, commands = make(target, version="3.10")
  lines = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]
  assert lines == ['qed_jax needs Python >= 3.11 and "python3" is 3.10: try make PYTHON=python3.12']
  assert done.returncode != 0 and commands == []


def test_no_interpreter_is_one_line(make):
  """So is a command that is not there."""
  done, _ = make("demo", "PYTHON=python9")
  lines = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]
  assert lines == [
    'qed_jax needs Python >= 3.11 and "python9" is not one that runs: try make PYTHON=python3.12'
  ]


def test_no_file_names_a_registry():
  """Where packages come from is the business of pip's own configuration."""
  for name in (*FILES, ".ci/run", "README.md"):
    text = (ROOT / name).read_text()
    assert not re.search(
      r"index-url|find-links|pypi|https?://[\w.]*(wheel|simple|download)", text
    ), name


def test_every_pin_is_one_version():
  """name==version and nothing else, once a name."""
  lines = (ROOT / "constraints.txt").read_text().splitlines()
  pins = [line for line in lines if line and not line.startswith("#")]
  assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][\w.]*", pin) for pin in pins)
  names = [pin.split("==")[0] for pin in pins]
  assert len(names) == len(set(names)) and "jax" in names and "torch" in names
