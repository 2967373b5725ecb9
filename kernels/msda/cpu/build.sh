#!/bin/sh
# Build the library next to the package sources, for an editable checkout: kernels/msda/cpu/build.sh [OUTPUT]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/../../../src/gdino_hf/_msda_cpu.so}
flags="-O3 -std=gnu11 -fPIC -shared -fno-math-errno -fno-trapping-math -Wall -Wno-psabi"
tmp=$out.$$.tmp
# shellcheck disable=SC2086
${CC:-cc} $flags -fopenmp "$here/ms_deform_attn.c" -o "$tmp" || ${CC:-cc} $flags "$here/ms_deform_attn.c" -o "$tmp"
mv -f "$tmp" "$out"
echo "$out"
