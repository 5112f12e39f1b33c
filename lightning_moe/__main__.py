"""`python -m lightning_moe`."""

from lightning_moe.cli import main

if __name__ == "__main__":
    main()
