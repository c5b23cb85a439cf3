"""`python -m dalle` is the command `dalle`."""

from dalle.cli import main

if __name__ == "__main__":
    main()
