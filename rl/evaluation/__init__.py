"""Evaluation: what a policy can do, with the uncertainty of every figure and what it cost."""
