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
resolve() { "$tmp/bin/uv" pip compile --quiet --no-config --default-index https://pypi.org/simple "$@"; }
resolve pyproject.toml --extra dev --universal --python-version "$min" --upgrade --no-emit-index-url --no-emit-find-links \
    --no-annotate --custom-compile-command 'make constraints' --output-file "$tmp/pins.txt"

# That may pick a release with no wheel for some Python or platform, so each of them is resolved once more, from these pins and wheels alone.
pythons=$(sed -n 's/^pythons="\(.*\)"/\1/p' tools/python.sh | tr ' ' '\n' | sort -V)
sed -n 's/^\(dev_\)\{0,1\}requirements *= *//p' settings.ini | tr ' ' '\n' > "$tmp/requirements.in"
export MACOSX_DEPLOYMENT_TARGET=14.0
for python in $pythons; do
    for platform in x86_64-manylinux_2_28 aarch64-manylinux_2_28 x86_64-pc-windows-msvc aarch64-apple-darwin; do
        resolve "$tmp/requirements.in" -c "$tmp/pins.txt" --python-version "$python" --python-platform "$platform" --only-binary :all: >/dev/null || {
            echo "The newest releases do not install on Python $python, $platform, for the reason above: bound the one at fault in settings.ini." >&2
            exit 1
        }
    done
done

{ echo "# For Python $(head -n 1 <<<"$pythons") to $(tail -n 1 <<<"$pythons")"; cat "$tmp/pins.txt"; } > "$tmp/constraints.txt"
mv "$tmp/constraints.txt" constraints.txt
echo "Wrote constraints.txt with $(grep -c == constraints.txt) pins."
