#!/usr/bin/env bash
# Prints the Python to make the virtual environment with: $PYTHON if it is set, else the first suitable one on PATH.
set -u
cd "$(dirname "$0")/.."
# Versions that constraints.txt has pins for, in the order in which they are looked for. 3.14 comes last: processes that load images
# import fastai anew in each epoch there, and torch says of `torch.jit.script`, which fastai calls, that it "may break".
pythons="3.13 3.12 3.11 3.10 3.14"
oldest=$(printf '%s\n' $pythons | sort -V | head -n 1)
newest=$(printf '%s\n' $pythons | sort -V | tail -n 1)
remedy="install Python $oldest to $newest (with its venv package: apt install python3-venv on Debian and Ubuntu) or name one with make PYTHON=/path/to/python"

# Prints why $1 cannot be used, or nothing. A version manager's shim may exist and still not run.
fault() {
    local version
    version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null </dev/null) || { echo "does not run"; return; }
    [[ " $pythons " = *" $version "* ]] || { echo "is Python $version"; return; }
    [ "$("$1" -c 'import platform; print(platform.python_version())' 2>/dev/null </dev/null)" != 3.14.1 ] || { echo "is Python 3.14.1, which torchvision refuses"; return; }
    "$1" -c 'import venv, ensurepip' 2>/dev/null </dev/null || echo "lacks the modules venv and ensurepip"
}

# The interpreter behind shims and virtual environments, so that .venv never stands on itself.
base() { "$1" -c 'import sys; print(getattr(sys, "_base_executable", None) or sys.executable)' </dev/null; }

if [ -n "${PYTHON:-}" ]; then
    why=$(fault "$PYTHON")
    [ -z "$why" ] && { base "$PYTHON"; exit; }
    echo "PYTHON=$PYTHON $why: $remedy." >&2
    exit 1
fi

seen=
for name in $(printf 'python%s ' $pythons) python3 python; do
    command -v "$name" >/dev/null || continue
    why=$(fault "$name")
    [ -z "$why" ] && { base "$name"; exit; }
    [ "$why" = "does not run" ] || seen="$seen${seen:+, }$name $why"
done
echo "No suitable Python found${seen:+ ($seen)}: $remedy." >&2
exit 1
