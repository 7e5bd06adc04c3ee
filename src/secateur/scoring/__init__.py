"""One file per way to localise."""

from secateur.scoring.attribution import Attribution
from secateur.scoring.base import Ranking, Scorer, Scores, Settings

__all__ = ["Attribution", "Ranking", "Scorer", "Scores", "Settings"]
