#!/usr/bin/env bash
# Builds the Horovod wheel for the torch of one Python from PyPI packages alone, and prints the wheel's path.
#
#   docker/build-horovod.sh PYTHON        e.g. docker/build-horovod.sh .venv/bin/python
#
# NCCL and Gloo always (Gloo alone when torch is a CPU build), MPI where mpicxx is found. No system CUDA is needed,
# nor looked at unless HVD_LB_CUDA_HOME names one. Without a network: docker/offline.py. The wheel is kept in ${HVD_LB_CACHE:-${XDG_CACHE_HOME:-~/.cache}/hvd-lb}/wheels/KEY with a checksum;
# KEY hashes all that goes in (docker/horovod_parts.py), so a second call takes a second.
# The wheel's path goes to stdout, progress to stderr. Exit 2: something has to be installed first, the line says what.
#
# Environment: HOROVOD_WITHOUT_MPI=1 leaves MPI out, HOROVOD_BUILD_CUDA_CC_LIST and HOROVOD_BUILD_ARCH_FLAGS name
# GPU and CPU targets, HVD_LB_CUDA_HOME an installed CUDA toolkit to take in place of PyPI's,
# HVD_LB_BUILD_JOBS the number of compilers at once, CC and CXX the compiler.
set -euo pipefail

say() { printf 'build-horovod: %s\n' "$*" >&2; }
refuse() { say "$*"; exit 2; }

[[ $# -eq 1 && $1 != -* ]] || refuse "usage: docker/build-horovod.sh PYTHON (the interpreter that has torch)"
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
python=$(command -v -- "$1") || refuse "no such Python: $1"
[[ $python == /* ]] || python=$PWD/$python

parts() { "$python" "$here/horovod_parts.py" "$@"; }

# The version of the MPI that mpicxx belongs to, or nothing: it is part of the cache key.
mpi_version() {
    [[ ${HOROVOD_WITHOUT_MPI:-0} != 1 ]] && command -v mpicxx >/dev/null || return 0
    mpicxx --showme:version 2>/dev/null || mpicxx -show 2>/dev/null || echo "mpicxx of unknown make"
}

# Prints the wheel of a cache entry whose checksum fits; fails on anything else.
intact_wheel() {
    local entry=$1 wheel
    wheel=$(find "$entry" -maxdepth 1 -name '*.whl' 2>/dev/null) || return 1
    [[ -f $wheel && -f $entry/SHA256SUMS ]] || return 1
    (cd -- "$entry" && sha256sum --check --strict --status SHA256SUMS) 2>/dev/null || return 1
    grep -qF -- "  ${wheel##*/}" "$entry/SHA256SUMS" || return 1
    printf '%s\n' "$wheel"
}

# How many compilers run at once: one per core, but 2 GB of memory for each.
build_jobs() {
    local cores memory
    cores=$(nproc)
    memory=$(awk '/^MemAvailable:/ { print int($2 / 2000000) }' /proc/meminfo)
    ((memory > 0)) || memory=1
    printf '%s\n' "${HVD_LB_BUILD_JOBS:-$((cores < memory ? cores : memory))}"
}

# Prints a colon-separated path without the folders that hold a file of the given pattern.
path_without() {
    local path=$1 pattern=$2 kept="" folder
    while IFS= read -r -d : folder; do
        if [[ -n $folder ]] && ! compgen -G "$folder/$pattern" >/dev/null; then
            kept+=${kept:+:}$folder
        fi
    done <<<"$path:"
    printf '%s\n' "$kept"
}

# Forgets every setting by which a CUDA, NCCL, CMake or Horovod of this machine would get into the build.
forget_system_cuda() {
    local name
    while IFS= read -r name; do
        case $name in
            CUDA* | NVCC* | NVIDIA_* | NCCL_* | HOROVOD_* | CMAKE_* | NVTX* | TORCH_CUDA* | MAKEFLAGS | MFLAGS | \
                MAKEOVERRIDES | CPATH | C_INCLUDE_PATH | CPLUS_INCLUDE_PATH | LIBRARY_PATH | CFLAGS | CXXFLAGS | \
                CPPFLAGS | LDFLAGS | PYTHONPATH | PYTHONHOME)
                unset "$name"
                ;;
        esac
    done < <(compgen -e)
    if [[ -n ${LD_LIBRARY_PATH:-} ]]; then
        LD_LIBRARY_PATH=$(path_without "$(path_without "$LD_LIBRARY_PATH" 'libcudart.so*')" 'libnccl.so*')
        export LD_LIBRARY_PATH
    fi
}

# An interpreter that sees torch and the build tools, and leaves the user's environment as it is.
make_build_environment() {
    local venv=$1 description=$2 site
    "$python" -m venv --without-pip "$venv"
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    parts requirements "$description" >"$venv/requirements.txt"
    "$python" -m pip --python "$venv/bin/python" install --quiet --no-warn-script-location \
        --requirement "$venv/requirements.txt" >&2
    "$python" - "$site/parent.pth" <<'PYTHON'
import site, sys, sysconfig
folders = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()])
with open(sys.argv[1], "w") as file:
    file.writelines(f"import site; site.addsitedir({folder!r})\n" for folder in folders)
PYTHON
}

# cmake for Horovod's setup.py: no run paths into the throw-away folders (torch has loaded the libraries before),
# no debug information (70 MB), and no CUDA at all for a CPU torch.
write_cmake_wrapper() {
    local wrapper=$1 cmake=$2 cuda=$3
    local options="-DCMAKE_SKIP_RPATH=ON -DCMAKE_SHARED_LINKER_FLAGS=-Wl,--strip-debug"
    [[ -n $cuda ]] || options+=" -DCMAKE_CUDA_COMPILER=NOTFOUND -DCMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=ON"
    cat >"$wrapper" <<WRAPPER
#!/bin/sh
case \$1 in
    --build | --version) exec "$cmake" "\$@" ;;
    *) exec "$cmake" "\$@" $options ;;
esac
WRAPPER
    chmod +x "$wrapper"
}

# Shows every tenth per cent of cmake's progress; all of the output is in the log.
show_progress() {
    awk 'match($0, /\[ *[0-9]+%\]/) { p = substr($0, RSTART + 1, RLENGTH - 3) + 0
         if (p >= next_shown) { printf "build-horovod: %d %%\n", p; fflush(); next_shown = p - p % 10 + 10 } }' >&2
}

build() {
    local work=$1 description=$2 cuda=$3 mpi=$4 architectures arch_flags jobs
    architectures=$(field "$description" architectures)
    arch_flags=$(field "$description" cpu_flags)
    forget_system_cuda
    say "installing build tools into a throw-away environment"
    make_build_environment "$work/venv" "$description"
    local tools=$work/venv/bin pip=("$python" -m pip --python "$work/venv/bin/python")

    parts sdist >"$work/sdist.txt"
    "${pip[@]}" download --quiet --no-deps --no-build-isolation --no-binary horovod --require-hashes \
        --requirement "$work/sdist.txt" --dest "$work" >&2
    tar -xzf "$work"/horovod-*.tar.gz -C "$work"
    parts patch "$work"/horovod-*/

    write_cmake_wrapper "$work/cmake" "$tools/cmake" "$cuda"
    jobs=$(build_jobs)
    export HOROVOD_CMAKE=$work/cmake CMAKE_POLICY_VERSION_MINIMUM=3.5 MAKEFLAGS=-j$jobs
    export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITH_GLOO=1
    [[ -z $arch_flags ]] || export HOROVOD_BUILD_ARCH_FLAGS=$arch_flags
    if [[ -n $mpi ]]; then export HOROVOD_WITH_MPI=1; else export HOROVOD_WITHOUT_MPI=1; fi
    if [[ -n $cuda ]]; then
        local toolkit=$work/toolkit
        "$tools/python" "$here/horovod_parts.py" toolkit --system="${HVD_LB_CUDA_HOME:-}" "$toolkit"
        export CUDA_HOME=$toolkit CUDA_PATH=$toolkit CUDAToolkit_ROOT=$toolkit HOROVOD_CUDA_HOME=$toolkit
        export HOROVOD_GPU=CUDA HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_NCCL_LINK=SHARED
        export HOROVOD_NCCL_INCLUDE=$toolkit/nccl/include HOROVOD_NCCL_LIB=$toolkit/nccl/lib
        export HOROVOD_BUILD_CUDA_CC_LIST=$architectures PATH=$toolkit/bin:$PATH
    fi

    say "compiling with $jobs jobs at once (about 5 minutes on 2 cores)"
    if ! "${pip[@]}" wheel -v --no-deps --no-build-isolation --no-cache-dir --wheel-dir "$work/wheel" \
        "$work"/horovod-*/ 2>&1 | tee "$work/build.log" | show_progress; then
        grep -nE 'error:|CMake Error|undefined reference|fatal' "$work/build.log" | head -n 20 >&2 || true
        local kept=${TMPDIR:-/tmp}/build-horovod-$$.log
        cp -- "$work/build.log" "$kept"
        say "Horovod did not compile; all of the output is in $kept"
        return 1
    fi
    finish "$work" "$description" "$cuda" "$mpi"
}

# Puts the description into the wheel and checks that its library loads and has what it should.
finish() {
    local work=$1 description=$2 cuda=$3 mpi=$4 tools=$1/venv/bin
    "$tools/python" -m wheel unpack --dest "$work/unpacked" "$work"/wheel/*.whl >&2
    local contents=("$work"/unpacked/*)
    cp -- "$description" "${contents[0]}/horovod/hvd_lb_build.json"
    rm -- "$work"/wheel/*.whl
    "$tools/python" -m wheel pack --dest-dir "$work/wheel" "${contents[0]}" >&2
    (cd -- "$work" && PYTHONPATH=${contents[0]} "$tools/python" - "$cuda" "$mpi" <<'PYTHON'
import sys
import horovod.torch as hvd
cuda, mpi = sys.argv[1:]
if not hvd.gloo_built() or bool(hvd.nccl_built()) != bool(cuda) or bool(hvd.mpi_built()) != bool(mpi):
    sys.exit("build-horovod: the wheel was built without Gloo, NCCL or MPI although they were asked for")
PYTHON
    )
}

field() { "$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]] or "")' "$1" "$2"; }

# Renaming a complete folder into place: an entry is there with its checksum or not at all.
publish() {
    local work=$1 entry=$2
    fresh=$(mktemp -d -- "${entry%/*}/.new-XXXXXX")
    cp -- "$work"/wheel/*.whl "$work/description.json" "$fresh/"
    (cd -- "$fresh" && sha256sum -- *.whl >SHA256SUMS)
    chmod 755 "$fresh"
    sync -- "$fresh"/*
    rm -rf -- "$entry"
    mv -T -- "$fresh" "$entry"
}

work=$(mktemp -d -t build-horovod-XXXXXX)
fresh=$work # publish() names a folder in the cache here; whatever of it is left goes too
trap 'rm -rf -- "$work" "$fresh"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

mpi=$(mpi_version)
parts describe --mpi "$mpi" --architectures "${HOROVOD_BUILD_CUDA_CC_LIST:-}" \
    --arch-flags="${HOROVOD_BUILD_ARCH_FLAGS:-}" --system="${HVD_LB_CUDA_HOME:-}" >"$work/description.json" || exit 2
key=$(parts key "$work/description.json")
wheels=${HVD_LB_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/hvd-lb}/wheels
mkdir -p -- "$wheels" || refuse "cannot write $wheels: set HVD_LB_CACHE to a folder that you may write"
entry=$(cd -- "$wheels" && pwd)/$key

if wheel=$(intact_wheel "$entry"); then
    printf '%s\n' "$wheel"
    exit 0
fi
missing=()
[[ -n $(command -v "${CXX:-g++}") ]] || missing+=(g++)
command -v make >/dev/null || missing+=(make)
"$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
    missing+=(python3-dev)
"$python" -m pip --version >/dev/null 2>&1 || refuse "$python has no pip: $python -m ensurepip"
((${#missing[@]} == 0)) || refuse "what compiles Horovod is missing: apt-get install ${missing[*]}"

exec 9>"$entry.lock"
flock --nonblock 9 || { say "another build of the same wheel is running; waiting for it"; flock 9; }
if ! wheel=$(intact_wheel "$entry"); then
    [[ ! -e $entry ]] || say "the cached wheel is damaged and will be built again"
    cuda=$(field "$work/description.json" cuda)
    say "Horovod $(field "$work/description.json" horovod) for torch $(field "$work/description.json" torch):" \
        "Gloo${cuda:+, NCCL}${mpi:+, MPI}"
    (build "$work" "$work/description.json" "$cuda" "$mpi") 9>&- # its environment ends with it, and no child keeps the lock
    publish "$work" "$entry"
    wheel=$(intact_wheel "$entry") || { say "the wheel in $entry is damaged right after writing"; exit 1; }
fi
printf '%s\n' "$wheel"
