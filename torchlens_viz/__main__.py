"""`python -m torchlens_viz` is the command line."""

from __future__ import annotations

import sys

from torchlens_viz.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
