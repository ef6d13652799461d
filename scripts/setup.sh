# Sourced by demo.sh, test.sh and .ci/run: makes .venv (once) and installs hardjax with the extras named in $1 ("[test]").
# The exact versions stand in constraints.txt; PYTHON picks another interpreter (3.11 or later).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in
  "["*"]") extras=$1 ;;
  *) extras="" ;;   # sourced without an argument, $1 is the caller's own
esac
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "hardjax needs Python 3.11 or later; $("$python" --version) found. Set PYTHON=/path/to/python3.11." >&2
  exit 2
}
stamp=".venv/.hardjax$extras"
if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
  echo "Setting up .venv (once) ..." >&2
  [ -d .venv ] || "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt -e ".$extras" >&2
  touch "$stamp"
fi
