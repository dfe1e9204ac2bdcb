"""Evaluation: suites of prompts, graders of answers, judges of refusals, and intervals around their rates."""
