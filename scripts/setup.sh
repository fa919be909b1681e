#!/usr/bin/env bash
# Prepare the virtual environment $1 (default .venv): Python >= 3.11, torch, this package with its dev tools.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}

if [ ! -x "$venv/bin/python" ]; then
    python=""
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$candidate; break; fi
    done
    if [ -z "$python" ]; then
        echo "setup: Python 3.11 or newer is needed, found $(python3 --version 2>&1 || true); install it and run again" >&2
        exit 1
    fi
    "$python" -m venv "$venv"
fi

constraints=constraints.txt
if "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    # The torch that is there stays, whatever version constraints.txt asks for.
    constraints=$(mktemp)
    trap 'rm -f "$constraints"' EXIT
    grep -v '^torch==' constraints.txt > "$constraints"
elif [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then
    # No card: uv can pick the CPU build; pip takes whatever its own settings offer for the pinned version.
    if ! { command -v uv >/dev/null &&
           uv pip install --python "$venv/bin/python" --torch-backend=auto -c constraints.txt torch; }; then
        "$venv/bin/python" -m pip install -c constraints.txt torch
    fi
fi
"$venv/bin/python" -m pip install -e '.[dev]' -c "$constraints"
