"""Library calls behind the command line: what each command does."""
