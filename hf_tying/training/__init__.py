"""What training needs beside `Trainer`: flags that declare ties, and the callback that checks them."""

from .arguments import TyingArguments

__all__ = ["TyingArguments"]
