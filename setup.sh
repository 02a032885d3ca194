#!/bin/sh
# Make .venv unless an environment is active, and install requirements.txt,
# or the file that REQUIREMENTS names. Run it from the folder that it lies in:
# `. ./setup.sh` leaves the environment active; demo.sh and test.sh do that.

_setup() {
    _list=${REQUIREMENTS:-requirements.txt}
    [ -f "$_list" ] || {
        echo "setup.sh: $_list is not in $PWD; run it in the" \
            "project's folder" >&2
        return 2
    }
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
        if [ ! -f .venv/bin/activate ]; then
            python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
                2> /dev/null || {
                echo 'setup.sh: Python 3.10 or later is needed; python3 is' \
                    "$(python3 --version 2> /dev/null || echo missing)" >&2
                return 2
            }
            echo 'setup.sh: making .venv'
            python3 -m venv .venv || {
                rm -rf .venv
                echo 'setup.sh: .venv cannot be made; Debian and Ubuntu have' \
                    'venv in the package python3-venv' >&2
                return 1
            }
        fi
        # shellcheck source=/dev/null
        . .venv/bin/activate
    fi
    python -m pip install --quiet --disable-pip-version-check \
        -r "$_list" || {
        echo "setup.sh: pip could not install $_list; see above" >&2
        return 1
    }
}
_setup
