"""`python -m hardjax`."""

from hardjax.cli import main

main()
