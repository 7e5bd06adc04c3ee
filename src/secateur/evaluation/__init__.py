"""Measure many masks."""

from secateur.evaluation.evaluator import Evaluator, Measurement

__all__ = ["Evaluator", "Measurement"]
