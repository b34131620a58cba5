"""Prompt templates: what is asked for is filled in, literally and once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qed_jax import prompts

OURS = {
  "prove": {"problem"},
  "bare": {"problem"},
  "quality": {"problem", "solution", "comments", "marker"},
  "marking_scheme": {"problem", "solution", "marker"},
  "reason": {"problem", "summary"},
  "summarise": {"problem", "existing_summary", "reasoning"},
  "judge": {"problem", "rubric", "marker", "submission", "scale"},
  "judge_reference": {"problem", "rubric", "reference", "marker", "submission", "scale"},
  "judge_imo": {"problem", "rubric", "reference", "marker", "submission", "scale"},
}


@pytest.mark.parametrize("name", OURS)
def test_template_asks_for_exactly_its_fields(name):
  assert prompts.fields(prompts.load(name)) == OURS[name]


def test_prove_is_the_prompt_of_the_released_data():
  """The SFT rows were made with this text: other tokens would be another distribution."""
  text = prompts.render(prompts.load("prove"), problem="Is $1=1$?")
  assert text == "Generate a rigorous proof to the following question:\n\nIs $1=1$?"


def test_reason_asks_for_a_proof_with_and_without_a_summary():
  template = prompts.load("reason")
  empty = prompts.render(template, problem="P", summary="")
  assert "rigorous proof" in empty
  assert prompts.render(template, problem="P", summary="S").count("S\n") > empty.count("S\n")


@pytest.mark.parametrize("name", [name for name in OURS if name.startswith("judge")])
def test_judge_prompts_state_the_task_again_below_the_submission(name):
  _, found, below = prompts.load(name).partition("{submission}")
  assert found
  assert "{marker}" in below and "{scale}" in below and "<score>N</score>" in below


@given(st.dictionaries(st.sampled_from("abc"), st.text(alphabet="{}abc\\\n", max_size=20)))
def test_values_are_never_substituted_again(values):
  """Braces in a value, even a placeholder's name, arrive as they are."""
  values = {"a": "", "b": "", "c": ""} | values
  text = prompts.render("1{a}2{b}3{c}4{a}", **values)
  assert text == f"1{values['a']}2{values['b']}3{values['c']}4{values['a']}"


def test_latex_and_empty_braces_in_a_template_are_text():
  assert prompts.render(r"put it in \boxed{} or { x }: {y}", y="{z}") == (
    r"put it in \boxed{} or { x }: {z}"
  )


def test_placeholder_without_a_value_is_named_in_one_line():
  with pytest.raises(ValueError, match=r"^.*\{solution\}.*\{problem\}$"):
    prompts.render("{problem} {solution}", problem="P")


def test_template_of_ones_own_is_read_as_it_is(tmp_path):
  path = tmp_path / "mine.txt"
  path.write_text("é {problem}\n\n", encoding="utf-8")
  assert prompts.load(str(path)) == "é {problem}\n"


def test_unknown_template_names_the_known_ones(tmp_path):
  binary = tmp_path / "binary.md"
  binary.write_bytes(b"\xff\xfe{problem}")
  for name in ("jugde", "", str(tmp_path), str(binary)):
    with pytest.raises(ValueError, match="judge_imo") as caught:
      prompts.load(name)
    assert "\n" not in str(caught.value)
