"""`python -m hf_tying` is `hf-tying`."""

from .cli import main

if __name__ == "__main__":
    main()
