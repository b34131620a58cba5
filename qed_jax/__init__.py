"""QED-Nano in JAX. Read train.py first, then rollout/experience.py, objectives/, model/qwen3.py."""
