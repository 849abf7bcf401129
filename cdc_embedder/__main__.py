"""`python -m cdc_embedder` is the command line."""

from cdc_embedder.cli import main

if __name__ == "__main__":
    main()
