#!/bin/sh
# MLX's CPU wheel brings reference BLAS only; with OpenBLAS in the process (mlxserver/engine/platform/openblas.py) matrix products
# are some seventy times faster. Installs it on a Debian-like Linux as root, otherwise says what to type.
[ "$(uname -s)" = Linux ] || exit 0
ldconfig -p 2>/dev/null | grep -q 'libopenblas\.so\.0' && exit 0
if ! command -v apt-get >/dev/null; then
    echo "For speed on this CPU install OpenBLAS (the library libopenblas.so.0) with your package manager."
elif [ "$(id -u)" != 0 ]; then
    echo "For speed on this CPU type: sudo apt-get install -y libopenblas0-pthread"
else
    (apt-get install -y -qq libopenblas0-pthread || (apt-get update -qq && apt-get install -y -qq libopenblas0-pthread)) >/dev/null 2>&1 ||
        echo "OpenBLAS could not be installed; type: apt-get update && apt-get install -y libopenblas0-pthread"
fi
exit 0
