"""`python -m gptoss_opt`."""

import sys

STOPPED = 130

if __name__ == "__main__":
    try:
        from .cli import main

        sys.exit(main())
    except KeyboardInterrupt:  # while all is imported
        sys.exit(STOPPED)
