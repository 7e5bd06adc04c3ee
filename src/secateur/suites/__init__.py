"""What is asked: built-in YAML suites, a user's own, and their validation."""

from secateur.suites.loading import DEFAULT_SUITE, fill, fill_text, load_suite, suite_hash, suite_names
from secateur.suites.schema import LikelihoodPair, Paraphrase, Preference, Quantity, Scenario, Suite

__all__ = [
    "DEFAULT_SUITE",
    "LikelihoodPair",
    "Paraphrase",
    "Preference",
    "Quantity",
    "Scenario",
    "Suite",
    "fill",
    "fill_text",
    "load_suite",
    "suite_hash",
    "suite_names",
]
