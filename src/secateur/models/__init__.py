"""Load a model; know where its units are."""

from secateur.models.families import FAMILIES, Family, family_of
from secateur.models.language_model import LanguageModel, TokenUsage
from secateur.models.loading import DEFAULT_MODEL, load

__all__ = ["DEFAULT_MODEL", "FAMILIES", "Family", "LanguageModel", "TokenUsage", "family_of", "load"]
