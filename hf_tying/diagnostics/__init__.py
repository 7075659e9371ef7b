"""Measurements of each role's effect on a tied matrix: alignment to an untied twin, rank, and gradient."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

_HOME = {
    "Alignment": "geometry",
    "MatrixDiagnosis": "diagnosis",
    "RoleDiagnostics": "diagnosis",
    "alignment": "geometry",
    "diagnose": "diagnosis",
    "effective_rank": "geometry",
    "gradient_shares": "diagnosis",
}

__all__ = [
    "Alignment",
    "MatrixDiagnosis",
    "RoleDiagnostics",
    "alignment",
    "diagnose",
    "effective_rank",
    "gradient_shares",
]

if TYPE_CHECKING:
    from .diagnosis import MatrixDiagnosis, RoleDiagnostics, diagnose, gradient_shares
    from .geometry import Alignment, alignment, effective_rank
else:
    __getattr__, __dir__ = lazy_names(globals(), _HOME)
