#!/bin/sh
# Make .venv unless an environment is active, and install requirements.txt,
# or the file that REQUIREMENTS names. Run it from the folder that it lies in:
# `. ./setup.sh` leaves the environment active; demo.sh and test.sh do that.

if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    if [ ! -x .venv/bin/python ]; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "setup.sh: $(python3 --version) is too old; 3.10 or later" \
                'is needed' >&2
            # shellcheck disable=SC2317  # exit: where it was not sourced
            return 2 2> /dev/null || exit 2
        }
        echo 'setup.sh: making .venv'
        python3 -m venv .venv
    fi
    # shellcheck source=/dev/null
    . .venv/bin/activate
fi
python -m pip install --quiet --disable-pip-version-check \
    -r "${REQUIREMENTS:-requirements.txt}"
