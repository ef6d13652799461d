#!/usr/bin/env bash
# Sets up .venv and runs the tests in three tiers; what follows the tier goes to pytest.
#   (none)   what a newcomer runs: a few minutes on two cores
#   --ci     what that leaves and every submission needs: larger networks, the installed wheel, the smaller axes in pairs
#   --slow   everything, the largest networks included: about an hour
source "$(dirname "$0")/setup.sh" "[test]"
case "${1:-}" in
  --ci) marks=(-m "ci and not slow"); shift ;;
  --slow) marks=(); shift ;;
  *) marks=(-m "not ci and not slow") ;;
esac
# Tests of a file share programs, so a file stays with its worker until one of them has nothing left to do.
exec .venv/bin/python -m pytest -n auto --dist worksteal "${marks[@]}" "$@"
