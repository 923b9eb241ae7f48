#!/usr/bin/env bash
# Writes constraints.txt: one pinned version of every dependency, with markers for Python versions and platforms.
# Index, configuration and header are given here, so that no setting of this machine gets into the file.
set -euo pipefail
cd "$(dirname "$0")/.."
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
base=$(tools/python.sh)
"$base" -m venv "$tmp"
"$tmp/bin/python" -m pip install -q --disable-pip-version-check 'uv>=0.9'
min=$(sed -n 's/^min_python *= *//p' settings.ini)
"$tmp/bin/uv" pip compile pyproject.toml --extra dev --universal --python-version "$min" --upgrade --quiet \
    --no-config --default-index https://pypi.org/simple --no-emit-index-url --no-emit-find-links --no-annotate \
    --custom-compile-command 'make constraints' --output-file "$tmp/constraints.txt"
mv "$tmp/constraints.txt" constraints.txt
echo "Wrote constraints.txt with $(grep -c == constraints.txt) pins."
