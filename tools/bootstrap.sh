#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes a virtual environment with torch, builds deepcompile and installs it there.
#
#   tools/bootstrap.sh VENV TORCH     e.g. .venv 'torch==2.11.*'   or   .venv-newest torch
#   tools/bootstrap.sh VENV TORCH packages    without building deepcompile
#
# Each phase is skipped when nothing it depends on has changed, so running this
# again costs seconds. PYTHON names the Python to start from (default python3).
# FOR_TESTS=1 also installs what single tests need that are skipped without it, and takes the
# compiler's warnings for errors. QUICK=1 compiles the runtime in less time, to run slower.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?name of the virtual environment}
torch=${2:?torch requirement}
until=${3:-build}
quick=${QUICK:-0}
python=${PYTHON:-python3}
started=$SECONDS

say() { printf '[%4d s] %s\n' "$((SECONDS - started))" "$*"; }
die() { printf 'bootstrap: %s\n' "$*" >&2; exit 1; }

python_ok() { "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }
venv_ok() { "$python" -c 'import ensurepip, venv' 2>/dev/null; }
headers_ok() {
  "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' 2>/dev/null
}
compiler_ok() {
  command -v g++ >/dev/null && echo 'int main() { return 0; }' | g++ -std=c++20 -xc++ -fsyntax-only - 2>/dev/null
}
header_ok() { command -v g++ >/dev/null && echo "#include <$1>" | g++ -std=c++20 -xc++ -fsyntax-only - 2>/dev/null; }

# Debian packages that are missing, by what they are needed for.
missing_packages() {
  python_ok || echo python3
  venv_ok || echo python3-venv
  headers_ok || echo python3-dev
  compiler_ok || echo g++
  command -v cmake >/dev/null || echo cmake
  command -v ninja >/dev/null || echo ninja-build
  header_ok nlohmann/json.hpp || echo nlohmann-json3-dev
  header_ok gtest/gtest.h || echo libgtest-dev
  # Not needed, but the tests build the core more than once.
  [ "$(id -u)" != 0 ] || command -v ccache >/dev/null || echo ccache
}

system_packages() {
  local needed
  needed=$(missing_packages | tr '\n' ' ')
  [ -z "$needed" ] && return 0
  local install="apt-get update && apt-get install -y --no-install-recommends ${needed% }"
  command -v apt-get >/dev/null ||
    die "these Debian packages, or their likes, are missing: $needed"
  if [ "$(id -u)" = 0 ]; then
    say "installing ${needed% }"
    apt-get update -qq >/dev/null || die "apt-get update failed"
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $needed >/dev/null ||
      die "apt-get could not install: $needed"
  else
    die "some packages are missing. Run this, then the same command again:
  sudo sh -c '$install'"
  fi
  needed=$(missing_packages | tr '\n' ' ')
  [ -z "$needed" ] || die "still missing after installing: $needed (is PYTHON=$python the right one?)"
}

# An ssh server for the tests of `deepcompile launch`. Only in containers: elsewhere the package
# would start a server for everyone. A failure only means that those tests are skipped.
ssh_server() {
  [ "${FOR_TESTS:-0}" = 1 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 0
  [ ! -d /run/systemd/system ] || return 0
  (PATH=$PATH:/usr/sbin:/sbin && command -v sshd && command -v ssh && command -v ip) >/dev/null &&
    return 0
  local packages="openssh-server openssh-client iproute2" policy=/usr/sbin/policy-rc.d
  say "installing $packages"
  if [ -e "$policy" ]; then
    policy=
  else  # Debian's way to install a service without starting it
    printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy" || return 0
  fi
  # shellcheck disable=SC2086
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
      apt-get install -y -qq --no-install-recommends $packages; } >/dev/null 2>&1 ||
    say "could not install them: the tests of launch on two nodes will be skipped"
  [ -z "$policy" ] || rm -f "$policy"
}

digest() { sha256sum | cut -d' ' -f1; }

# Runs a phase unless its stamp holds the same key.
phase() {
  local name=$1 key=$2 what=$3
  shift 3
  if [ -f "$venv/.stamps/$name" ] && [ "$(cat "$venv/.stamps/$name")" = "$key" ]; then
    return 0
  fi
  say "$what"
  local log="$venv/.stamps/$name.log"
  if ! "$@" >"$log" 2>&1; then
    tail -n 30 "$log" >&2
    die "failed: $what (whole log: $log)"
  fi
  echo "$key" >"$venv/.stamps/$name"
}

create_venv() {
  if ! "$venv/bin/python" -c '' 2>/dev/null; then
    say "creating $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv" || die "could not create $venv: remove it and try again"
  fi
  mkdir -p "$venv/.stamps"
}

requirements() {
  "$venv/bin/python" tools/requirements.py test lint build
}

# With uv, which takes a quarter of pip's time. It does not know pip's settings (an index of
# one's own), so pip is asked where uv fails.
install_packages() {
  local pip=("$venv/bin/python" -m pip install -q --disable-pip-version-check --prefer-binary)
  "${pip[@]}" --upgrade 'pip>=24' 'uv>=0.4,<1' || return 1
  requirements >"$venv/.stamps/requirements.txt" || return 1
  local wanted=(-r "$venv/.stamps/requirements.txt" "$torch")
  "$venv/bin/uv" pip install --python "$venv/bin/python" "${wanted[@]}" ||
    { echo "uv could not, so pip is asked" && "${pip[@]}" "${wanted[@]}"; }
}

build() {
  export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
  if command -v ccache >/dev/null; then
    export CMAKE_CXX_COMPILER_LAUNCHER=ccache
    export CCACHE_SLOPPINESS=pch_defines,time_macros  # or it takes no file with precompiled headers
    export CCACHE_BASEDIR=$PWD  # what another build folder compiled is taken
    export CXX=${CXX:-g++}  # Debian's Python names another, and the name is hashed too
  fi
  # What is compiled for the tests has the flags of tools/run_tests.py, so that it is compiled once.
  "$venv/bin/python" -m pip install --disable-pip-version-check --no-build-isolation --no-deps \
    --force-reinstall -C build-dir="build/$(basename "$venv")" -C build.verbose=false \
    -C cmake.define.DEEPCOMPILE_QUICK="$quick" -C cmake.define.DEEPCOMPILE_WERROR="${FOR_TESTS:-0}" .
}

sources() {
  find core bindings cmake python pyproject.toml CMakeLists.txt -type f \
    ! -name '*.pyc' ! -name '*.so' -print0 | sort -z | xargs -0 sha256sum
}

system_packages
ssh_server
create_venv
phase packages "$( (cat pyproject.toml; echo "$torch") | digest)" \
  "installing $torch and what else is needed from PyPI (some minutes the first time)" install_packages
[ "$until" != packages ] || exit 0
phase build "$( (cat "$venv/.stamps/packages"; echo "$quick"; sources) | digest)" \
  "building the C++ core and the extension (two to three minutes on two cores)" build
say "ready: $("$venv/bin/python" -c 'import sys, torch, deepcompile
from importlib.metadata import version
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, deepcompile {version(deepcompile.__name__)}")')"
