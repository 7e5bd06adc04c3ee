"""Errors that are the user's to mend: one clear sentence each, shown without a traceback."""


class SecateurError(Exception):
    """Base of every error that Secateur raises on purpose."""


class ModelError(SecateurError):
    """A model cannot be found, loaded, or is of a family without a row in the architecture table."""


class SuiteError(SecateurError):
    """A suite cannot be found or does not follow the schema."""


class DataError(SecateurError):
    """A text or a data set is missing, empty or too small for what is asked."""


class MaskError(SecateurError):
    """A mask or plan is unreadable or belongs to another model."""


class OutputError(SecateurError):
    """A result cannot be written where it was asked for."""


class NumericalError(SecateurError):
    """The model returned values that are not finite."""


class SettingError(SecateurError):
    """A setting is unknown or out of its range."""


class StoreError(SecateurError):
    """A store of measured masks is locked, or cannot be opened or written; or one of the following."""


class UnusableStoreError(StoreError):
    """A store of measured masks belongs to another model or version, is none, or is damaged."""


class ClusterError(SecateurError):
    """A Ray cluster is not installed, does not answer, or loses its actors."""
