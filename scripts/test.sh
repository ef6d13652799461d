#!/usr/bin/env bash
# Sets up .venv and runs the tests. Options: --slow also runs the longer checks; the rest goes to pytest.
source "$(dirname "$0")/setup.sh" "[test]"
marks=(-m "not slow")
if [ "${1:-}" = "--slow" ]; then marks=(); shift; fi
exec .venv/bin/python -m pytest -n auto "${marks[@]}" "$@"
