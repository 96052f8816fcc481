# shellcheck shell=bash
# Sourced from the root of the checkout: makes .venv if it is missing or broken, installs the pinned requirements and
# this package if they changed, and sets PYTHON to the interpreter to use.
# M1_PYTHON=/path/to/python: use that interpreter as it is (it must be able to import megatron_m1) and install nothing.

# Print the first Python >= 3.12 that really runs (a pyenv shim may exist for a version that is not selected).
find_python() {
    local candidate
    local candidates=(python3.12 python3)
    local root="${PYENV_ROOT:-$HOME/.pyenv}"
    candidates+=("$root"/versions/3.12*/bin/python "$root"/versions/*/bin/python)
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then
            echo "$candidate"
            return 0
        fi
    done
    echo "error: no Python >= 3.12 with venv found (tried python3.12, python3 and $root/versions); install one." >&2
    return 1
}

# A digest of everything the installation depends on.
requirements_digest() {
    "$1" -c 'import hashlib, pathlib, sys
content = b"".join(pathlib.Path(name).read_bytes() for name in ("requirements.txt", "setup.py", "pyproject.toml"))
print(hashlib.sha256(content + repr((sys.version_info[:2], str(pathlib.Path.cwd()))).encode()).hexdigest())'
}

setup_env() {
    if [[ -n "${M1_PYTHON:-}" ]]; then
        if ! "$M1_PYTHON" -c 'import megatron_m1, m1_kernels'; then
            echo "error: M1_PYTHON=$M1_PYTHON cannot import megatron_m1; run 'pip install --no-deps -e .' with it, or" \
                "unset M1_PYTHON to let this script make .venv." >&2
            return 1
        fi
        PYTHON="$M1_PYTHON"
        return 0
    fi
    PYTHON=.venv/bin/python
    if ! "$PYTHON" -c 'import sys, pip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then
        local base
        base="$(find_python)" || return 1
        echo "making .venv with $("$base" --version)"
        "$base" -m venv --clear .venv || return 1
    fi
    local digest
    digest="$(requirements_digest "$PYTHON")" || return 1
    if [[ "$(cat .venv/.m1_installed 2>/dev/null)" != "$digest" ]]; then
        echo "installing the pinned requirements into .venv (about 5 GB and a few minutes the first time)"
        # -qq leaves errors only; bytecode is made when a module is first imported.
        local install=("$PYTHON" -m pip install -qq --disable-pip-version-check --no-compile)
        "${install[@]}" --requirement requirements.txt || return 1
        "${install[@]}" --no-deps --no-build-isolation --editable . || return 1
        echo "$digest" >.venv/.m1_installed
    fi
    PATH="$PWD/.venv/bin:$PATH"
    export PATH
}

setup_env || exit 1
