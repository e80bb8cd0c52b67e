#!/bin/sh
# Make or complete a virtual environment: tools/setup.sh FOLDER LOCK   (interpreter: PYTHON, or found by itself)
# Packages come as wheels with the hashes of the lock, so that no compiler is needed and nothing else gets in. The lock is
# complete, so nothing is resolved: pip 23 looks past the lock at `coverage[toml]` once a newer coverage is out, and stops.
set -eu
folder=$1
lock=$2

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13 python3.14}; do
    if new_enough "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  cat >&2 <<EOF
error: no Python 3.11 or newer (tried ${PYTHON:-python3 and python3.11 to python3.14})
  Debian, Ubuntu   apt-get install python3 python3-venv
  Fedora           dnf install python3.12
  macOS            brew install python@3.12
  elsewhere        make PYTHON=/path/to/python3.11 ...
EOF
  return 1
}

if ! new_enough "$folder/bin/python" || ! "$folder/bin/python" -m pip --version >/dev/null 2>&1; then
  python=$(find_python)
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    echo "error: $python has no venv: apt-get install python3-venv, then the same command again" >&2
    exit 1
  fi
  echo "setup: $folder with $("$python" --version)"
  "$python" -m venv --clear "$folder"
fi
echo "setup: packages of $lock (about a minute the first time)"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-input \
  --require-hashes --only-binary :all: --no-deps --requirement "$lock"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-input \
  --no-index --no-deps --no-build-isolation --editable .
