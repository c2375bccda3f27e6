"""`python -m ckptconv`."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="ckptconv")
