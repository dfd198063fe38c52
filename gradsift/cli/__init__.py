"""The command line: flags to library calls, results to text."""

from __future__ import annotations


def main() -> None:
    """Entry point of the command `gradsift`."""
    from gradsift.cli import app

    app.main()
