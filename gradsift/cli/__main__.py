"""`python -m gradsift.cli` is the command `gradsift`."""

from gradsift.cli import main

main()
