"""What each role does to a tied matrix: how near it lies to an untied twin's matrices, its rank, its gradient."""

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

__all__ = [*_HOME]

__getattr__, __dir__ = lazy_names(globals(), _HOME)
