"""`python -m legocompress_cli`: the command, for those who start it by module name."""

from .main import main

if __name__ == "__main__":
    main()
