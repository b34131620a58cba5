"""Graders: `await grade(problem, proof, ...)` gives a Grade.

Its score is None when the proof could not be graded, which is never a zero. Its reason begins with
"graded", "empty" or "precheck" (a zero that no judge was asked for), "invalid" (no reply could be
read) or "failed".
"""
