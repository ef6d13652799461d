"""`python -m hardjax`."""

from hardjax.cli.main import main

main()
