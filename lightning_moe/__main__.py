"""`python -m lightning_moe`."""

import logging

# bitsandbytes looks for an optional kernel package at import and says so each time; nothing here needs it.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

from lightning_moe.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
