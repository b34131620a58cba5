"""The authors' own numbers: nine recorded cases, and the same cases written in other ways."""

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qed_jax.objectives import policy_gradient

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "check_policy_gradient.py"
FILE = ROOT / "tests" / "goldens" / "policy_gradient_cases.json"
CASES = json.loads(FILE.read_text())
ROWS = [i for i, case in enumerate(CASES) if case["position_ids"] is None]
PER_TOKEN = ("input_ids", "labels", "behavior_logprobs", "reference_logprobs", "logits")


@pytest.fixture(scope="module")
def tool():
  """tools/check_policy_gradient.py as a module; found by path, for tools/ is not a package."""
  spec = importlib.util.spec_from_file_location("check_policy_gradient", TOOL)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture
def check(tool, tmp_path, capsys):
  """check(content) -> (exit status, last line of stdout, stderr) of the tool on that file."""

  def run(content):
    path = tmp_path / "cases.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    status = tool.main([str(path)])
    out, err = capsys.readouterr()
    return status, out.splitlines()[-1] if out else "", err

  return run


def passes(result, cases):
  status, last_line, _ = result
  figures = json.loads(last_line)
  assert figures["max_loss_error"] < 1e-6 and figures["max_gradient_error"] < 1e-6
  assert (status, figures["cases"], figures["failed"]) == (0, cases, 0)


def pack(case, rows, tails, zeros):
  """The rows of a case laid into packed rows, with `tails` tokens of padding behind each.

  rows: per packed row, the old rows it holds. zeros: whether padding's positions are 0 or go on.
  """
  packed, V = copy.deepcopy(case), len(case["logits"][0][0])
  fill = {"labels": -100, "logits": [0.5] * V}
  for key in PER_TOKEN:
    packed[key] = [
      sum((case[key][i] for i in old), []) + [fill.get(key, 1)] * tail
      for old, tail in zip(rows, tails, strict=True)
    ]
  T = len(case["labels"][0])
  packed["position_ids"] = [
    list(range(T)) * len(old) + ([0] * tail if zeros else list(range(T, T + tail)))
    for old, tail in zip(rows, tails, strict=True)
  ]
  packed["expected"]["grad_logits"] = [
    sum((case["expected"]["grad_logits"][i] for i in old), []) + [[0.0] * V] * tail
    for old, tail in zip(rows, tails, strict=True)
  ]
  packed["advantages"] = [case["advantages"][i] for old in rows for i in old]
  return packed


def test_every_recorded_case_holds_to_1e_6():
  """The tool as a user runs it: nine cases, loss and gradient within 1e-6, exit status 0."""
  done = subprocess.run(
    [sys.executable, str(TOOL), str(FILE)], cwd=ROOT, capture_output=True, text=True, timeout=300
  )
  assert done.returncode == 0, done.stderr
  passes((0, done.stdout.splitlines()[-1], ""), cases=9)


def test_metrics_agree_with_the_recorded_ratios(tool):
  """Sums of rho and rho^2 over trained tokens; the authors' reinforce truncates rho first."""
  with jax.enable_x64(True):
    for raw, case in zip(CASES, tool.read_file(str(FILE)), strict=True):
      logits_BTV, batch, temperature, options = case["inputs"]
      logp_BTV = jax.nn.log_softmax(logits_BTV / temperature)
      next_BT1 = np.roll(batch.tokens_BT, -1, axis=1)[..., None]
      logp_BT = jnp.roll(jnp.take_along_axis(logp_BTV, next_BT1, axis=-1)[..., 0], 1, axis=1)
      _, metrics = policy_gradient.loss(logp_BT, jnp.zeros_like(logp_BT), batch, **options)
      if options["policy_loss"] == "ppo" or metrics["clip_share"][0] == 0:
        np.testing.assert_allclose(metrics["ratio"][0], raw["expected"]["ratio_sum"], rtol=1e-9)
        np.testing.assert_allclose(metrics["ratio_sq"][0], raw["expected"]["ratio_sq_sum"])


@pytest.mark.parametrize("where", ["loss", "gradient", "advantages", "epsilon", "temperature"])
def test_a_wrong_number_is_found(check, where):
  """A loss or a gradient off by 1e-5, or an input that differs, fails; the case is counted."""
  cases = copy.deepcopy(CASES[4:6])
  if where == "loss":
    cases[0]["expected"]["loss"] *= 1 + 1e-5
  elif where == "gradient":
    row = cases[0]["expected"]["grad_logits"][0][4]
    row[3] += 1e-5 * np.abs(cases[0]["expected"]["grad_logits"]).max()
  elif where == "advantages":
    cases[0]["advantages"][1] *= -1
  else:
    cases[0]["config"][where] *= 1.01
  status, last_line, _ = check(cases)
  assert status == 1 and json.loads(last_line)["failed"] == 1


@pytest.mark.parametrize("i", ROWS)
def test_packed_rows_equal_single_rows(check, i):
  """Rows of a case in packed rows of two and one, with padding: the same loss and gradient."""
  case = CASES[i]
  passes(
    check(
      [
        pack(case, [[0, 1, 2]], [0], zeros=False),
        pack(case, [[2, 0, 1]], [4], zeros=True),
        pack(case, [[0, 1], [2]], [0, len(case["labels"][0])], zeros=True),
        pack(case, [[1], [0, 2]], [2 + len(case["labels"][0]), 2], zeros=False),
      ]
    ),
    cases=4,
  )


def test_sequences_of_different_lengths_in_one_row(check):
  """Prompts cut from the front of packed sequences change neither loss nor gradient."""
  case = copy.deepcopy(CASES[6])
  drop = {9, 18}  # the first prompt tokens of the second and third sequence
  for key in PER_TOKEN:
    case[key] = [[x for t, x in enumerate(case[key][0]) if t not in drop]]
  grad = case["expected"]["grad_logits"][0]
  case["expected"]["grad_logits"] = [[x for t, x in enumerate(grad) if t not in drop]]
  case["position_ids"] = [[*range(9), *range(8), *range(8)]]
  passes(check([case]), cases=1)


def test_other_ways_to_write_a_case(check):
  """Advantages per row or per token, group lengths per sequence, two epsilons, one case alone."""
  packed, grouped = copy.deepcopy(CASES[6]), copy.deepcopy(CASES[7])
  per_row = packed | {"advantages": [packed["advantages"]]}
  per_token = packed | {
    "advantages": [[a for a in packed["advantages"] for _ in range(9)]],
    "note": "ignored",
  }
  split = copy.deepcopy(CASES[4])
  epsilon = split["config"].pop("epsilon")
  split["config"] |= {"epsilon_low": epsilon, "epsilon_high": epsilon}
  group_tokens = grouped["config"].pop("mean_group_tokens")
  per_sequence = grouped | {"mean_group_tokens": [group_tokens] * 3}
  masked = copy.deepcopy(CASES[0])  # what is not trained may be null
  masked["behavior_logprobs"][0][0] = None
  masked["reference_logprobs"] = None
  passes(check({"cases": [per_row, per_token, split, per_sequence, masked]}), cases=5)
  passes(check(packed), cases=1)


def test_a_fully_masked_sequence_keeps_its_place(check):
  """A sequence without trained tokens still owns an advantage: the others keep theirs."""
  case = pack(CASES[0], [[0, 1, 2]], [0], zeros=False)
  T = len(CASES[0]["labels"][0])
  for key in PER_TOKEN:
    case[key] = [case[key][0][:T] + case[key][0][:T] + case[key][0][T:]]
  case["labels"][0][T : 2 * T] = [-100] * T
  case["position_ids"] = [list(range(T)) * 4]
  grad = case["expected"]["grad_logits"][0]
  zeros = [[0.0] * len(grad[0])] * T
  case["expected"]["grad_logits"] = [grad[:T] + zeros + grad[T:]]
  a, b, c = case["advantages"]
  left_out = case | {"advantages": [a, b, c]}
  passes(check([case | {"advantages": [a, 99.0, b, c]}, left_out]), cases=2)


def test_overlong_filtering_takes_the_truncated_out(check):
  """The loss with one sequence filtered is the loss of the file without its tokens."""
  case = copy.deepcopy(CASES[0])
  case["config"]["overlong_filtering"] = True
  case["overflow"] = [0, 1, 0]
  status, _, _ = check([case])
  assert status == 1
  rest = copy.deepcopy(CASES[0])
  rest["labels"][1] = [-100] * len(rest["labels"][1])
  case["expected"]["grad_logits"][1] = np.zeros_like(case["expected"]["grad_logits"][1]).tolist()
  rest["expected"]["grad_logits"] = case["expected"]["grad_logits"]
  gradients_only = [check([c])[1] for c in (case, rest)]
  errors = [json.loads(line) for line in gradients_only]
  assert all(error["max_gradient_error"] < 1e-6 for error in errors)
  np.testing.assert_allclose(errors[0]["max_loss_error"], errors[1]["max_loss_error"], rtol=1e-9)


def without(key):
  return lambda case: case.pop(key)


MALFORMED = {
  "no logits": (without("logits"), "'logits' is missing"),
  "no config": (without("config"), "'config' is missing"),
  "no expected": (without("expected"), "'expected' is missing"),
  "no epsilon": (lambda case: case["config"].pop("epsilon"), "'epsilon_low' is missing"),
  "no batch size": (lambda case: case["config"].pop("batch_size"), "'batch_size' is missing"),
  "zero batch": (lambda case: case["config"].update(batch_size=0), "not positive"),
  "cold": (lambda case: case["config"].update(temperature=0), "'temperature' is 0.0"),
  "text": (lambda case: case["config"].update(kl_coef="0"), "'kl_coef' is '0'"),
  "loss": (lambda case: case["config"].update(policy_loss="gspo"), "'gspo'; known are ppo"),
  "ragged": (lambda case: case["logits"][0].pop(), "'logits' is not a rectangular array"),
  "short": (lambda case: case["labels"].pop(), "'labels' has shape [2, 9], wanted [3, 9]"),
  "token": (lambda case: case["input_ids"][0].__setitem__(0, 11), "leaves the vocabulary of 11"),
  "half": (lambda case: case["labels"][0].__setitem__(0, 0.5), "'labels' holds a number that"),
  "null": (lambda case: case["behavior_logprobs"][0].__setitem__(8, None), "not a finite number"),
  "advantages": (lambda case: case["advantages"].pop(), "'advantages' has 2 numbers for 3"),
  "gradient": (lambda case: case["expected"].pop("grad_logits"), "'grad_logits' is missing"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_case_is_one_line_with_its_number(check, name):
  """Exit status 2; stderr has one line that names the file, the case and what is wrong."""
  spoil, message = MALFORMED[name]
  cases = copy.deepcopy(CASES[:2])
  spoil(cases[1])
  status, last_line, err = check(cases)
  assert status == 2 and last_line == ""
  assert err.count("\n") == 1 and "cases.json: case 1: " in err and message in err


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"cases": 1}', "[3]", '["a"]'])
def test_a_file_that_is_no_list_of_cases_is_one_line(check, content):
  """Not JSON, empty, or not objects: exit status 2 and one line."""
  status, _, err = check(content)
  assert status == 2 and err.count("\n") == 1


def test_a_missing_file_is_one_line(tool, tmp_path, capsys):
  """The path stands in the message."""
  assert tool.main([str(tmp_path / "none.json")]) == 2
  assert "none.json" in capsys.readouterr().err
