"""The model card of an export: README.md with YAML front matter, from what the run wrote down."""

import json
from pathlib import Path

import huggingface_hub

from qed_jax.model.hf_weights import read_json
from qed_jax.model.lora import Adapter
from qed_jax.model.qwen3 import Qwen3Config

FENCE = "```"
JOBS = ("sft", "rl", "cache_rl")
CHAIN = 8  # runs that may have started from one another


def card(name: str, config: Qwen3Config, parameters: int, dtype: str, workdir: Path) -> str:
  """README.md of an export.

  workdir: the source; its config.json, env.json, eval_summary.json and model/README.md (the card of
  the model that training started from) are used where they exist.
  """
  training, environment = (_optional(workdir / f) for f in ("config.json", "env.json"))
  base, origin = _base(workdir)
  data = training.get("data")
  inherited = _front_matter(workdir / "model" / "README.md")
  front = huggingface_hub.ModelCardData(
    library_name="transformers",
    pipeline_tag="text-generation",
    license=inherited.get("license"),
    license_link=inherited.get("license_link"),
    base_model=base,
    datasets=_hub_names([data.get("source") if isinstance(data, dict) else None]) or None,
    tags=["qwen3", "qed_jax", *[job for job in JOBS if training.get("job") == job]],
  )
  sections = {
    "Summary": f"A Qwen3 of {parameters:,} parameters that started from {origin}. "
    f"{config.num_layers} layers, width {config.hidden_size}, {config.num_heads} query and "
    f"{config.num_kv_heads} key/value heads of {config.head_dim}, "
    f"{config.vocab_size:,} tokens, up to {config.max_position:,} positions "
    f"(rope_theta {config.rope_theta:,.0f}), stored as {dtype}.",
    "How to use": f"""{FENCE}python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
messages = [{{"role": "user", "content": "Prove that the square root of 2 is irrational."}}]
prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**prompt, max_new_tokens=4096)
print(tokenizer.decode(output[0, prompt["input_ids"].shape[1]:]))
{FENCE}

The reasoning comes first; the proof is what follows `</think>`.""",
    "Evaluation": _evaluation(_optional(workdir / "eval_summary.json").get("rows", [])),
    "Training": _training(training, environment),
    "Limitations": "Proofs are not checked by a proof assistant: a convincing text may be wrong. "
    "The model was trained on mathematics and is not meant to hold conversations.",
    "License": f"{inherited['license']}, as the base model's."
    if "license" in inherited
    else "The source folder states none; set `license` above before publishing.",
  }
  body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
  return f"---\n{front.to_yaml()}\n---\n\n# {name}\n\n{body}\n"


def adapter_card(name: str, adapter: Adapter, base: str, workdir: Path) -> str:
  """README.md of an adapter in PEFT's form."""
  training, environment = (_optional(workdir / f) for f in ("config.json", "env.json"))
  data = training.get("data")
  hub_base = next(iter(_hub_names([base])), None)
  front = huggingface_hub.ModelCardData(
    library_name="peft",
    pipeline_tag="text-generation",
    base_model=hub_base,
    datasets=_hub_names([data.get("source") if isinstance(data, dict) else None]) or None,
    tags=["qwen3", "qed_jax", "lora", *[job for job in JOBS if training.get("job") == job]],
  )
  loaded = hub_base or "the base model's folder"
  sections = {
    "Summary": f"A LoRA adapter for {hub_base or 'a local model'}: rank {adapter.rank}, alpha "
    f"{adapter.alpha:g}, on {', '.join(path.split('.')[-1] for path in adapter.targets)}.",
    "How to use": f"""{FENCE}python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{loaded}", dtype="auto")
model = PeftModel.from_pretrained(base, "{name}")
{FENCE}""",
    "Training": _training(training, environment),
  }
  body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
  return f"---\n{front.to_yaml()}\n---\n\n# {name}\n\n{body}\n"


def _evaluation(rows) -> str:
  """Scores with their 95 % intervals, as evaluate.py computed them."""
  if not rows:
    return "Not evaluated."
  columns = ("label", "scaffold", "turns", "n", "score", "low", "high")
  lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
  for row in rows:
    cells = (row.get(column, "") for column in columns)
    lines.append(
      "| " + " | ".join(f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells) + " |"
    )
  return "\n".join(lines)


def _training(training, environment) -> str:
  if not training:
    return "The source folder holds no record of it."
  parts = [f"{FENCE}json\n{json.dumps(_portable(training), indent=2)}\n{FENCE}"]
  if environment:
    packages = ", ".join(f"{k} {v}" for k, v in environment.get("packages", {}).items())
    parts.append(
      f"On {environment.get('devices')} x {environment.get('device_kind')}, "
      f"commit {environment.get('git')}, {packages}."
    )
  return "\n\n".join(parts)


def _portable(value):
  """Absolute paths are cut to their last part: they say nothing to others, and may say who."""
  if isinstance(value, dict):
    return {key: _portable(item) for key, item in value.items()}
  if isinstance(value, list):
    return [_portable(item) for item in value]
  return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def _base(workdir: Path) -> tuple[str | None, str]:
  """The hub id at the start of the chain of runs, if known, and the words for it."""
  for _ in range(CHAIN):
    init = _optional(workdir / "config.json").get("init")
    if init == "":
      return None, "random weights"
    if not isinstance(init, str):
      break
    if not Path(init).exists():
      if not _hub_names([init]):
        break
      return init, f"[{init}](https://huggingface.co/{init})"
    workdir = Path(init)
  return None, "a local folder of weights"


def _hub_names(names) -> list[str]:
  return [n for n in names if isinstance(n, str) and n.count("/") == 1 and not n.startswith("/")]


def _front_matter(path: Path) -> dict:
  if not path.is_file():
    return {}
  return huggingface_hub.ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()


def _optional(path: Path) -> dict:
  return read_json(path) if path.is_file() else {}
