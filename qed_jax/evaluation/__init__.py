"""Evaluation: problems through a scaffold, graded, in rows; and what the rows say."""
