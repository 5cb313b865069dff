"""`python -m slimc`."""

from slimc.cli import main

if __name__ == "__main__":
    main()
