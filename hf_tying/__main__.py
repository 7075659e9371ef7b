"""`python -m hf_tying` is `hf-tying`."""

from .cli.app import main

if __name__ == "__main__":
    main()
