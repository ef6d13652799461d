# Sourced by demo.sh and test.sh: makes .venv (once) and installs hardjax with the extras named in $1.
# The exact versions stand in constraints.txt; PYTHON picks another interpreter (3.11 or later).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "hardjax needs Python 3.11 or later; $("$python" --version) found. Set PYTHON=/path/to/python3.11." >&2
  exit 2
}
stamp=".venv/.hardjax$1"
if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
  echo "Setting up .venv (once) ..." >&2
  [ -d .venv ] || "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt -e ".$1" >&2
  touch "$stamp"
fi
