"""Dtypes by the names that safetensors has for them: their names in torch, and the bytes of an element."""

from ..ties.headers import BITS

TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
_FILE_NAMES = {name: dtype for dtype, name in TORCH_NAMES.items()}


def bytes_of(dtype: str) -> int:
    """Bytes of one element; 0 of an unknown dtype, and of one of less than a byte."""
    return BITS.get(dtype, 0) // 8


def torch_dtype(dtype: str) -> str:
    """A dtype's name in torch, from its name in a file."""
    return TORCH_NAMES.get(dtype, dtype.lower())


def file_dtype(name: str) -> str:
    """A dtype's name in a file, from its name in torch."""
    return _FILE_NAMES.get(name, name.upper())
