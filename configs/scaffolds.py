"""Scaffolds at their published values: what the `scaffold` block of an evaluation can be.

  from configs import scaffolds
  c.scaffold = scaffolds.get("rsa")

A block names its scaffold (`solve`, a file of qed_jax/scaffolds), the sampling of its calls, its
prompts (files of qed_jax/prompts, or paths), and as `generate` the block of the scaffold that makes
its first proofs. QED-Nano's agents sample 229,376 tokens at T = 0.8, top-p 1, no top-k
(eval/configs/agents), where nothing else is said. The names:

  direct, reasoning_cache, deepseek_math, rsa, selfcheck, nomos, static_agent, planner
      as in QED-Nano's evaluation
  reasoning_cache_paper   12 turns of 16,384 tokens (arXiv 2602.03773)
  deepseek_math_released  128 proofs, 64 verifications, 16 rounds of 32 x 4 (run.sh of its authors)
  rsa_paper               16 proofs, random subsets of 4, 10 rounds, 8,192 tokens (2509.26626)
  deepseek_math_cache     8 proofs by an 8-turn cache, 4 verifications, 6 rounds (2602.03773)
  rsa_cache               8 proofs by one, subsets of 2, 10 rounds, each merge starts one (the same)
"""

from ml_collections import ConfigDict


def get(name: str, tiny: bool = False) -> ConfigDict:
  """The block called so. tiny: with the budgets and prompts of the tiny world.

  Raises ValueError in one line, with the known names, for another name.
  """
  if name not in BLOCKS:
    raise ValueError(f"no scaffold {name!r}: use one of {', '.join(BLOCKS)}")
  block = {"name": name} | BLOCKS[name]()
  return ConfigDict(shrunk(block) if tiny else block)


def sampling(max_tokens: int = 229_376, temperature: float = 0.8, top_p: float = 1.0) -> dict:
  """How a call samples; top_k 0 is off."""
  return {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": 0}


def direct(prompt: str = "prove", reason: dict | None = None) -> dict:
  return {"solve": "direct", "reason": reason or sampling(), "prompts": {"prompt": prompt}}


def reasoning_cache(turns: int = 3, reason: dict | None = None) -> dict:
  return {
    "solve": "reasoning_cache",
    "turns": turns,
    "reason": reason or sampling(),
    # As in training; the agent of the evaluation set no limit to a summary.
    "summarise_sampling": sampling(2_048, 0.7, 0.8) | {"top_k": 20},
    "prompts": {"reason_template": "reason", "summarise_template": "summarise"},
  }


def deepseek_math(generate: dict | None = None) -> dict:
  return {
    "solve": "deepseek_math",
    "generate": generate or direct("dsm_prove"),
    "pool_size": 4,
    "verifications": 4,  # of each proof
    "meta_verifications": 0,  # of each analysis that found fault; 0 takes its word
    "iterations": 2,
    "best": 4,  # proofs that an iteration refines,
    "refinements": 1,  # so many times each,
    "analyses": 2,  # by so many analyses each time
    "sampling": sampling(),
    "verify_sampling": sampling(),
    "prompts": {
      "verify_template": "dsm_verify",
      "meta_template": "dsm_meta_verify",
      "refine_template": "dsm_refine",
    },
  }


def deepseek_math_released() -> dict:
  generation = sampling(131_072, 1.0, 0.95)
  return deepseek_math(direct("dsm_prove", generation)) | {
    "pool_size": 128,
    "verifications": 64,
    "iterations": 16,
    "best": 32,
    "refinements": 4,
    "analyses": 1,
    "sampling": generation,
    "verify_sampling": sampling(65_536, 1.0, 0.95),
  }


def deepseek_math_cache() -> dict:
  short = sampling(16_384, 1.0)
  counts = {"pool_size": 8, "iterations": 6, "best": 8}
  how = {"sampling": short, "verify_sampling": short}
  return deepseek_math(reasoning_cache(8, short)) | counts | how


def rsa(generate: dict | None = None, refine: dict | None = None) -> dict:
  return {
    "solve": "rsa",
    "generate": generate or direct(),
    "refine": refine or {},  # a reasoning cache that goes on from each merged proof
    "population": 8,
    "subset": 3,
    "rounds": 3,
    "subsets_by": "circulant",
    "select": "knockout",
    "sampling": sampling(),
    "prompts": {"merge_template": "merge", "select_template": "select"},
  }


def rsa_paper() -> dict:
  short = sampling(8_192, 1.0)
  return rsa(direct(reason=short)) | {
    "population": 16,
    "subset": 4,
    "rounds": 10,
    "subsets_by": "random",
    "select": "random",
    "sampling": short,
  }


def rsa_cache() -> dict:
  short = sampling(16_384, 1.0)
  counts = {"population": 8, "subset": 2, "rounds": 10, "subsets_by": "random", "select": "random"}
  cache = reasoning_cache(8, short)
  return rsa(cache, reasoning_cache(8, short)) | counts | {"sampling": short}


def selfcheck() -> dict:
  return {
    "solve": "selfcheck",
    "generate": direct(),
    "correct_count": 5,  # passes in a row that accept
    "error_count": 10,  # failures in a row that give up
    "max_iterations": 30,
    "return_if_not_found": True,
    "sampling": sampling(),
    "prompts": {
      "prompt": "prove",
      "improve_template": "selfcheck_improve",
      "verify_template": "verify",
      "classify_template": "selfcheck_classify",
      "correct_template": "selfcheck_correct",
    },
  }


def nomos() -> dict:
  return {
    "solve": "nomos",
    "generate": direct(),
    "solutions": 16,
    "target_perfect": 8,
    "max_kept": 12,
    "sampling": sampling(),
    "prompts": {
      "score_template": "nomos_score",
      "consolidate_template": "nomos_consolidate",
      "select_template": "select",
    },
  }


def static_agent() -> dict:
  return {
    "solve": "static_agent",
    "generate": direct(),
    "slots": 4,  # without a given approach
    "approaches": 0,  # more slots, with one
    "per_slot": 2,
    "verifications": 1,
    "sampling": sampling(),
    "prompts": {
      "approaches_template": "approaches",
      "approach_template": "prove_by_approach",
      "verify_template": "verify",
      "improve_template": "improve",
      "merge_template": "merge",
      "select_template": "select",
    },
  }


def planner() -> dict:
  return {
    "solve": "planner",
    "generate": direct(),
    "max_calls": 15,
    "max_solutions": 4,  # without those improved or merged from others
    "max_approaches": 4,
    "sampling": sampling(),
    "prompts": {"plan_template": "planner"} | static_agent()["prompts"],
  }


BLOCKS = {
  "direct": direct,
  "reasoning_cache": reasoning_cache,
  "deepseek_math": deepseek_math,
  "rsa": rsa,
  "selfcheck": selfcheck,
  "nomos": nomos,
  "static_agent": static_agent,
  "planner": planner,
  "reasoning_cache_paper": lambda: reasoning_cache(12, sampling(16_384, 1.0)),
  "deepseek_math_released": deepseek_math_released,
  "rsa_paper": rsa_paper,
  "deepseek_math_cache": deepseek_math_cache,
  "rsa_cache": rsa_cache,
}

TINY_PROMPTS = {
  "prompt": "tiny_reason",
  "reason_template": "tiny_reason",
  "summarise_template": "tiny_summarise",
  "verify_template": "tiny_check",
  "score_template": "tiny_check",
  "meta_template": "tiny_check",
  "improve_template": "tiny_improve",
  "refine_template": "tiny_improve",
  "merge_template": "tiny_merge",
  "consolidate_template": "tiny_select",
  "select_template": "tiny_select",
  "classify_template": "tiny_classify",
  "correct_template": "tiny_again",
  "approaches_template": "tiny_plan",
  "approach_template": "tiny_plan",
  "plan_template": "tiny_plan",
}
# What fits into 128 tokens a prompt, and into a demonstration. The planner does not fit: where its
# conversation becomes too long it ends, and one proof is made directly.
TINY_COUNTS = {
  "deepseek_math": {"pool_size": 4, "verifications": 4, "iterations": 2, "best": 4},
  "rsa": {"population": 8, "subset": 2, "rounds": 3},
  "selfcheck": {"correct_count": 2, "error_count": 3, "max_iterations": 4},
  "nomos": {"solutions": 8, "target_perfect": 2, "max_kept": 2},
  "static_agent": {"slots": 2},
  "planner": {"max_calls": 4},
}


def shrunk(block: dict) -> dict:
  """The same scaffold for the tiny world, whatever is in it."""
  small = sampling(22, 0.8, 0.95) | {"top_k": 20}
  done = block | TINY_COUNTS.get(block["solve"], {})
  for name, value in block.items():
    if name == "prompts":
      done[name] = {key: TINY_PROMPTS[key] for key in value}
    elif name == "summarise_sampling":
      done[name] = sampling(26, 0.7, 0.8) | {"top_k": 20}
    elif isinstance(value, dict) and "max_tokens" in value:
      done[name] = small
    elif isinstance(value, dict) and "solve" in value:
      done[name] = shrunk(value)
  if block["solve"] == "selfcheck":
    done["prompts"]["improve_template"] = "tiny_again"  # a message that follows the proof
  return done
