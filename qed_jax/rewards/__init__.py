"""Graders: `await grade(problem, proof, ...)` gives a Grade.

Its score is None when the proof could not be graded, which is never a zero. Its reason begins with
"graded", "empty" (nothing to grade: a zero), "invalid" (no reply could be read) or "failed".
"""
