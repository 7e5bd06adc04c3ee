"""One file per way to localise; the registry names them."""

from collections.abc import Callable

from secateur.errors import SettingError
from secateur.scoring.attribution import Attribution
from secateur.scoring.base import Scorer, Scores

SCORERS: dict[str, Callable[[], Scorer]] = {
    "attribution": Attribution,
}


def scorer(name: str) -> Scorer:
    """A scorer by name.

    Raises
    ------
    SettingError: there is no such method; the message lists those that exist.
    """
    if name not in SCORERS:
        raise SettingError(f"Unknown method '{name}'; choose one of: {', '.join(SCORERS)}.")
    return SCORERS[name]()


__all__ = ["SCORERS", "Attribution", "Scorer", "Scores", "scorer"]
