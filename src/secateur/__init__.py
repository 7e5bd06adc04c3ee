"""Find the attention heads and MLP neurons that carry a social bias, remove the few that matter, prove it.

>>> import secateur
>>> model = secateur.load()                                   # doctest: +SKIP
>>> result = secateur.repair(model, "occupations")            # doctest: +SKIP
>>> with result.plan.applied(model): ...                      # doctest: +SKIP
"""

__version__ = "0.1.0"

from secateur.api import apply, audit, compare, export, generalise, localise, repair, slim, verify
from secateur.errors import (
    DataError,
    MaskError,
    ModelError,
    NumericalError,
    OutputError,
    SecateurError,
    SettingError,
    SuiteError,
)
from secateur.models import LanguageModel, load
from secateur.studies.audit import AuditResult
from secateur.studies.compare import CompareResult, CompareSettings
from secateur.studies.generalise import GeneraliseSettings
from secateur.studies.localise import LocaliseResult, LocaliseSettings
from secateur.studies.plan import Plan, load_plan
from secateur.studies.reach import GeneraliseResult
from secateur.studies.repair import RepairResult, RepairSettings
from secateur.studies.slim import SlimResult, SlimSettings
from secateur.studies.verification import Verification, VerificationSettings
from secateur.suites import Suite, load_suite, suite_names
from secateur.units import Mask, Unit, UnitSpace, masked

__all__ = [
    "AuditResult",
    "CompareResult",
    "CompareSettings",
    "DataError",
    "GeneraliseResult",
    "GeneraliseSettings",
    "LanguageModel",
    "LocaliseResult",
    "LocaliseSettings",
    "Mask",
    "MaskError",
    "ModelError",
    "NumericalError",
    "OutputError",
    "Plan",
    "RepairResult",
    "RepairSettings",
    "SecateurError",
    "SettingError",
    "SlimResult",
    "SlimSettings",
    "Suite",
    "SuiteError",
    "Unit",
    "UnitSpace",
    "Verification",
    "VerificationSettings",
    "apply",
    "audit",
    "compare",
    "export",
    "generalise",
    "load",
    "load_plan",
    "load_suite",
    "localise",
    "masked",
    "repair",
    "slim",
    "suite_names",
    "verify",
]
