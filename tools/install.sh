#!/usr/bin/env bash
# Makes .venv and installs the package with pinned dependencies into it; the stamp says when there is nothing to do.
set -euo pipefail
cd -P "$(dirname "$0")/.."
py=.venv/bin/python
stamp=.venv/.installed

# Scripts in .venv/bin hold absolute paths, so another interpreter or another folder means another environment.
identity() { echo "$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2], sys.base_prefix)') $PWD"; }

lock=.venv.lock
begin() {
    [ -z "${begun:-}" ] || return 0
    mkdir "$lock" 2>/dev/null || {
        echo "Another installation is at work here: wait for it. If there is none, one was killed: remove $PWD/$lock and run the same command again." >&2
        exit 1
    }
    begun=yes
    trap 'rmdir "$lock"' EXIT
}

have=
if "$py" -m pip --version >/dev/null 2>&1; then
    have=$(identity "$py")
    [ ! -f "$stamp" ] || [ "$(head -n 1 "$stamp")" = "$have" ] || have=
    if [ -n "${PYTHON:-}" ]; then
        base=$(tools/python.sh)
        [ "$(identity "$base")" = "$have" ] || have=
    fi
fi

if [ -z "$have" ]; then
    base=$(tools/python.sh)
    begin
    echo "Creating .venv with $base"
    rm -rf .venv/bin  # first, so that a removal cut short leaves nothing that looks usable
    rm -rf .venv
    "$base" -m venv .venv
    have=$(identity "$py")
fi

want=$(printf '%s\n%s\n' "$have" "$(cat settings.ini setup.py pyproject.toml constraints.txt tools/install.sh | cksum)")
[ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && exit

begin
echo "Installing cekd_fastai and its pinned dependencies into .venv (minutes, about 7 GB on Linux, 2 elsewhere)"
if [ "$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null && [ -z "${PIP_EXTRA_INDEX_URL:-}" ]; then
    echo "No NVIDIA driver is found. For about 2 GB in place of 7, stop now (Ctrl-C) and start the same command with"
    echo "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu before it."
fi
quiet=-q
[ ! -t 1 ] || quiet=
echo unfinished > "$stamp"  # an installation cut short is started anew, as pip cannot tell which files are missing
install() { "$py" -m pip install $quiet --disable-pip-version-check -c constraints.txt "$@" </dev/null; }
# The build backend is installed first and used as it is, so that it is pinned like everything else.
{ install 'pip>=22.3' setuptools && install --no-build-isolation -e '.[dev]'; } || {
    echo "The installation failed for the reason above (often the network or a full disk): put it right and run the same command again." >&2
    exit 1
}
printf '%s\n' "$want" > "$stamp"
