#!/usr/bin/env bash
# Installs what the demo and the end-to-end tests need, into the project's .cache folder.
#
#   e2e/setup.sh            all of the following but the desktop
#   e2e/setup.sh go         nothing to install in .cache: looks for Go and a C compiler (SQLite is compiled with it)
#   e2e/setup.sh synapse    a Python environment with the homeserver; its directory is printed
#   e2e/setup.sh element    Node modules with Element's crypto; their directory is printed
#   e2e/setup.sh postgres   nothing in .cache: looks for the programs of PostgreSQL 14 or newer; their directory is printed
#   e2e/setup.sh desktop    nothing in .cache: looks for a desktop client and a screen for it; only make pictures needs them
#
# What is installed already is left alone, which takes no time. What the system lacks is named with the command that installs it;
# root gets it installed. Several runs at once wait for each other. Standard output has nothing but the directories.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=$(dirname "$here")/.cache
mkdir -p "$cache"

say() { printf '%s\n' "$*" >&2; }
fail() { say "e2e/setup.sh: $*"; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# A child in the foreground would keep this shell from hearing a signal, so the long ones run beside it, each in a process group
# of its own, which ends as a whole.
child=
trap '[[ -z $child ]] || { kill -- "-$child" && wait "$child"; } 2>/dev/null || :; exit 130' INT TERM HUP
run() { # LOG COMMAND...: runs the command, shows the end of its log if it fails
  local log=$1; shift
  set -m
  "$@" >>"$log" 2>&1 </dev/null &
  child=$!
  set +m
  local status=0
  wait "$child" || status=$?
  child=
  if ((status)); then tail -n 25 "$log" >&2; fail "'$1' failed with $status; all of its output is in $log"; fi
}

# The lock is held until the file descriptor closes, also by a child that outlives this script.
lock() { # NAME
  exec 9>"$cache/.$1.lock"
  flock 9
}
unlock() { exec 9>&-; }

# What the system itself must have: a function that tells whether it does, what to call it, and Debian's packages with it.
provide() { # CHECK WHAT PACKAGE...
  local check=$1 what=$2; shift 2
  ! "$check" || return 0
  say "This needs $what. On Debian and Ubuntu: apt-get update && apt-get install -y $*"
  have apt-get && ((EUID == 0)) || exit 1
  say "Doing so now, as we are root."
  lock system
  local log=$cache/system.log
  : >"$log"
  run "$log" apt-get update
  run "$log" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y --no-remove --no-install-recommends "$@"
  unlock
  hash -r
  "$check" || fail "the packages $* of this system do not provide $what (too old?): please install it from elsewhere."
}

# Any Go since 1.21 fetches by itself the version that go.mod asks for.
has_go() { have go && [[ $(GOTOOLCHAIN=local go env GOVERSION) =~ ^go1\.([0-9]+) ]] && ((BASH_REMATCH[1] >= 21)); }
has_cc() { have "${CC:-gcc}" && echo '#include <stdlib.h>' | "${CC:-gcc}" -E - >/dev/null 2>&1; }
has_python() { have python3 && python3 -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }
# Debian does not put the server's programs on the PATH, for there may be several versions.
postgres_programs() {
  local dir version
  for dir in $(ls -d /usr/lib/postgresql/*/bin /usr/pgsql-*/bin 2>/dev/null | sort -rV) "$(dirname "$(command -v initdb || echo /)")"; do
    [[ -x $dir/initdb && -x $dir/postgres ]] || continue
    version=$("$dir/postgres" --version | sed -n 's/^[^0-9]*\([0-9]\+\).*$/\1/p')
    ((${version:-0} >= 14)) || continue
    echo "$dir"
    return
  done
  return 1
}
has_postgres() { postgres_programs >/dev/null; }
has_node() { have npm && have node && node -e 'process.exit(parseInt(process.versions.node) < 20 ? 1 : 0)'; }

# The client, the screen and the fonts of the pictures. The bindings are those of the system's Python, whichever comes first on the PATH.
has_desktop() {
  have nheko && have Xvfb && have openbox && have dbus-daemon && have xdotool && have import && have fc-list &&
    /usr/bin/python3 -c 'import pyatspi' 2>/dev/null && [[ -x /usr/libexec/at-spi-bus-launcher ]] &&
    [[ -n $(fc-list Inter) && -n $(fc-list 'Noto Color Emoji') ]]
}

setup_go() {
  provide has_go "Go 1.26 or newer" golang-go
  provide has_cc "a C compiler with its headers" gcc libc6-dev
}

# The environment knows its own place, so it is made there. It counts from when its mark, the hash of what was asked for, is written.
setup_synapse() {
  local requirements=$here/synapse/requirements.txt version
  version=$(sed -n 's/^matrix-synapse==//p' "$requirements")
  local dir=$cache/synapse-$version log=$cache/synapse-$version.log mark
  read -r mark _ < <(sha256sum "$requirements")
  synapse_ready() { [[ -x $dir/bin/python && -f $dir/.ready && $(<"$dir/.ready") == "$mark" ]]; }
  if ! synapse_ready; then
    provide has_python "Python 3.10 or newer with venv" python3 python3-venv
    lock synapse
    if ! synapse_ready; then
      say "Installing Synapse $version (a minute) ..."
      rm -rf "$dir"
      : >"$log"
      run "$log" python3 -m venv "$dir"
      run "$log" "$dir/bin/python" -m pip install --disable-pip-version-check --no-input --prefer-binary -r "$requirements"
      run "$log" "$dir/bin/python" -c 'import synapse.app.homeserver'
      echo "$mark" >"$dir/.ready"
    fi
    unlock
  fi
  echo "$dir"
}

# Modules are looked for beside the program that imports them, so it is linked to where they are.
setup_element() {
  have node || provide has_node "Node.js 20 or newer with npm" nodejs npm
  local mark
  read -r mark _ < <(cat "$here/element/package.json" "$here/element/package-lock.json" | sha256sum)
  local dir=$cache/element-${mark:0:16} log=$cache/element-${mark:0:16}.log
  if [[ ! -d $dir ]]; then
    provide has_node "Node.js 20 or newer with npm" nodejs npm
    lock element
    if [[ ! -d $dir ]]; then
      say "Installing Element's crypto ..."
      local making=$dir.making
      rm -rf "$making"
      mkdir "$making"
      cp "$here/element/package.json" "$here/element/package-lock.json" "$here/element/.npmrc" "$making/"
      ln -s ../../e2e/element/driver.mjs "$making/driver.mjs"
      : >"$log"
      run "$log" npm ci --prefix "$making" --ignore-scripts
      mv "$making" "$dir"
    fi
    unlock
  fi
  echo "$dir"
}

setup_postgres() {
  provide has_postgres "the server of PostgreSQL 14 or newer" postgresql
  postgres_programs
}

setup_desktop() {
  provide has_desktop "the Matrix client nheko and a screen for it" nheko xvfb openbox dbus xdotool imagemagick at-spi2-core \
    python3-pyatspi fontconfig fonts-inter fonts-noto-color-emoji
}

(($#)) || set -- go synapse element postgres
for part; do
  case $part in
    go | synapse | element | postgres | desktop) "setup_$part" ;;
    *) fail "there is no '$part'; there are: go, synapse, element, postgres, desktop" ;;
  esac
done
