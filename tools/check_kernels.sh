#!/bin/sh
# The native kernels, built for a CPU that may be another one, beside plain loops (kernels.cpp). Without arguments: NEON, by
# apt-get install g++-aarch64-linux-gnu qemu-user-static. Other compilers, flags and emulators by the environment:
#   CXX=g++ FLAGS="-mavx2 -mfma -mf16c" LANES=8 RUN= sh tools/check_kernels.sh
set -e
cd "$(dirname "$0")"
sources=../mlxserver/engine/platform/native
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for source in kernels.cpp $sources/quantized.cpp $sources/dense.cpp $sources/functions.cpp $sources/attention.cpp \
    $sources/decode_attention.cpp $sources/affine.cpp $sources/logits.cpp $sources/recurrence.cpp; do
    ${CXX-aarch64-linux-gnu-g++} -O3 -std=c++20 -ffp-contract=fast -DLEVEL=portable -DLANES=${LANES-4} ${FLAGS-} -I$sources \
        -c $source -o "$folder/$(basename $source).o"
done
${CXX-aarch64-linux-gnu-g++} -static "$folder"/*.o -o "$folder/kernels"
${RUN-qemu-aarch64-static} "$folder/kernels"
