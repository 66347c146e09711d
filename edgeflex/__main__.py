"""``python -m edgeflex``."""

from edgeflex.cli import main

if __name__ == "__main__":
    main()
