"""`python -m hardjax`."""

from hardjax.cli.arguments import main

main()
