#!/usr/bin/env bash
# Makes the environment in which arkv-bench runs. `scripts/setup_env.sh --help` explains every option.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
default_extras=dev,peers,tune,ray

usage() {
    cat <<'HELP'
Usage: scripts/setup_env.sh [options]

Makes everything that arkv-bench needs to run, with the exact versions of constraints.txt, and installs this
repository's two distributions, arkv and arkv-bench, in editable mode (a change in the code takes effect at once). Run
it again whenever you like: when nothing has changed it ends within a second.

  scripts/setup_env.sh                                    a virtual environment in ./.venv; nothing else is touched
  scripts/setup_env.sh --venv ~/envs/arkv --extras peers  elsewhere, without the tools of a developer
  scripts/setup_env.sh --venv .venv-newest --newest-transformers
  scripts/setup_env.sh --conda                            a conda environment named arkv
  scripts/setup_env.sh --file exported.yml --name eval    a conda environment from a spec that someone exported

A virtual environment:
  --venv DIR      where to make it (default: .venv in the repository)
  --python PY     the Python to make it with, 3.10 or newer (default: python3)
  --extras LIST   which extras of pyproject.toml to install, separated by commas: dev (tests, lint, types),
                  peers (kvpress, quanto, hqq), tune (optuna), ray (default: dev,peers,tune,ray; "" for none)
  --newest-transformers
                  the newest release of transformers that is tested (constraints-newest.txt; needs Python 3.11)
                  instead of the pinned one. Only the extra dev, since kvpress does not work with it. It starts as a
                  copy of --base by hard links, so that it takes seconds and little disk.
  --base DIR      the environment to copy for --newest-transformers (default: .venv in the repository, when there is
                  one for the same Python; otherwise everything is installed anew)

A conda environment, with whichever of conda, mamba and micromamba is on PATH:
  --conda         make or update it from environment.yml, then install the pinned packages as above
  --file SPEC     from this exported spec instead; implies --conda. Works on a copy without its `prefix:` line (a path
                  on another machine) and under --name; your file stays as it is. The versions in the spec stand:
                  constraints.txt is not applied, and no extras are added unless you name them.
  --name NAME     its name (default: arkv)

Both:
  --dry-run       print the commands and run none of them
  -h, --help      this text

pip's own output goes to setup.log in the virtual environment. To start afresh, delete that folder.
HELP
}

say() { printf '%s\n' "$*"; }

fail() {
    printf 'setup_env.sh: %s\n' "$*" >&2
    exit 1
}

# Runs a command, or prints it where --dry-run was given.
run() {
    if [ "$dry_run" = yes ]; then
        printf '+'
        printf ' %q' "$@"
        printf '\n'
    else
        "$@"
    fi
}

# --venv, --base and --file are relative to where the caller stands.
absolute() {
    case $1 in
        /*) printf '%s' "$1" ;;
        *) printf '%s/%s' "$PWD" "$1" ;;
    esac
}

venv='' python='' extras='' base='' conda=no spec='' name='' newest=no dry_run=no extras_given=no
while [ $# -gt 0 ]; do
    case $1 in
        --venv | --python | --extras | --base | --file | --name)
            [ $# -ge 2 ] || fail "$1 needs a value; see --help"
            case $1 in
                --venv) venv=$(absolute "$2") ;;
                --python) python=$2 ;;
                --extras) extras=$2 extras_given=yes ;;
                --base) base=$(absolute "$2") ;;
                --file) spec=$(absolute "$2") conda=yes ;;
                --name) name=$2 ;;
            esac
            shift 2
            ;;
        --conda) conda=yes && shift ;;
        --newest-transformers) newest=yes && shift ;;
        --dry-run) dry_run=yes && shift ;;
        -h | --help) usage && exit 0 ;;
        *) fail "unknown option $1; see --help" ;;
    esac
done

if [ "$conda" = yes ]; then
    [ -z "$venv$python$base" ] && [ "$newest" = no ] ||
        fail "--venv, --python, --base and --newest-transformers are about a virtual environment, not about conda"
else
    [ -z "$name" ] || fail "--name is the name of a conda environment: add --conda or --file SPEC"
    [ -z "$base" ] || [ "$newest" = yes ] || fail "--base goes with --newest-transformers"
fi
[[ $extras =~ ^[A-Za-z0-9,_-]*$ ]] || fail "--extras is a list of names separated by commas, such as dev,peers"

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

# Both distributions of this repository, in one command: arkv-bench needs the arkv of the same version, which pip takes
# from the folder beside it instead of looking for it on an index. Call it once `extras` is decided.
editable() { checkout=(-e "$root/arkv" -e "$root${extras:+[$extras]}"); }

# ---------------------------------------------------------------------------------------------------------------------
# conda

# SPEC on stdin, the same on stdout under another name and without prefix. Only keys of the outermost mapping count (a
# variable called `prefix` stays), wherever they stand, quoted or not, with a value on the following lines or not.
rename_spec() {
    LC_ALL=C awk -v name="$1" '
        NR == 1 { sub(/^\357\273\277/, "") }
        { sub(/\r$/, "") }
        /^ *(#|$)/ || /^(---|\.\.\.|%)/ { print; next }
        {
            match($0, /^ */); depth = RLENGTH
            if (!started) { started = 1; top = depth; print substr($0, 1, depth) "name: " name }
            if (depth == top) dropped = ($0 ~ /^ *["\047]?(name|prefix)["\047]?[ \t]*:([ \t]|$)/)
            if (!dropped) print
        }
        END { exit !started }'
}

setup_conda() {
    local tool='' candidate given=$spec copy verb
    name=${name:-arkv}
    [[ $name =~ ^[A-Za-z0-9_.-]+$ ]] || fail "--name may hold letters, digits, '_', '-' and '.': $name"
    if [ -n "$given" ]; then
        [ -f "$given" ] || fail "no such file: $given"
    else
        spec=$root/environment.yml
        [ "$extras_given" = yes ] || extras=$default_extras
    fi
    for candidate in conda mamba micromamba; do
        if command -v "$candidate" >/dev/null 2>&1; then
            tool=$candidate
            break
        fi
    done
    [ -n "$tool" ] || fail "none of conda, mamba and micromamba is on PATH: install one, or leave out --conda for a virtual environment"

    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    copy=$scratch/environment.yml
    rename_spec "$name" <"$spec" >"$copy" || fail "nothing but comments in $spec"

    # mamba and micromamba would ask; update must not be used on what does not exist, nor create on what does.
    export CONDA_ALWAYS_YES=true MAMBA_ALWAYS_YES=true
    verb=create
    if "$tool" env list | awk -v name="$name" '$1 == name { found = 1 } END { exit !found }'; then verb=update; fi
    say "[1/2] $tool: $verb the environment $name from ${spec#"$root"/}"
    if [ "$dry_run" = yes ]; then
        say "# $copy: ${spec#"$root"/} with \`name: $name\` and without \`prefix:\`"
    fi
    if [ "$tool" = micromamba ] && [ "$verb" = update ]; then
        run micromamba install -y -n "$name" -f "$copy" # its own update ignores packages that are new in the file
    elif [ "$tool" = micromamba ]; then
        run micromamba create -y -n "$name" -f "$copy"
    else
        run "$tool" env "$verb" -n "$name" -f "$copy"
    fi

    say "[2/2] installing this repository in it${extras:+, extras: $extras}"
    editable
    if [ -n "$given" ]; then
        run "$tool" run -n "$name" python -m pip install -q "${checkout[@]}"
    else
        run "$tool" run -n "$name" python -m pip install -q -c "$root/constraints.txt" "${checkout[@]}"
    fi
    if [ "$dry_run" = no ]; then say "Ready in $SECONDS s. Next: $tool activate $name && arkv-bench --help"; fi
}

# ---------------------------------------------------------------------------------------------------------------------
# virtual environment

# Everything that decides what is in the environment, as one hash; also tells whether its Python still starts.
fingerprint() {
    local files=("$root/pyproject.toml" "$root/arkv/pyproject.toml" "$root/arkv/VERSION" "$root/constraints.txt")
    if [ "$newest" = yes ]; then files+=("$root/constraints-newest.txt"); fi
    "$venv/bin/python" -IS - "$root" "$extras" "$newest" "${files[@]}" 2>/dev/null <<'PY'
import hashlib, sys
digest = hashlib.sha256(repr((sys.version, sys.argv[1:4])).encode())
for path in sys.argv[4:]:
    with open(path, "rb") as file:
        digest.update(file.read())
print(digest.hexdigest())
PY
}

# The stamp marks an environment as made here, and holds its fingerprint once it is complete.
up_to_date() {
    local now
    [ -f "$stamp" ] && now=$(fingerprint) && [ "$now" = "$(cat "$stamp")" ]
}

complete() { [ -f "$1/.arkv-setup" ] && [ "$(cat "$1/.arkv-setup")" != unfinished ]; }

python_version() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }

# Only one process at a time may work on an environment (where flock exists: not on macOS).
lock() {
    if [ "$dry_run" = no ] && command -v flock >/dev/null 2>&1; then
        mkdir -p "$(dirname "$venv")"
        exec 9>"$venv.lock"
        flock -n 9 || { say "waiting for another set-up of $shown" && flock 9; }
    fi
}

# An empty environment in the place of an unusable one.
make_venv() {
    run "$python" -m venv --clear "$@" "$venv"
    if [ "$dry_run" = no ]; then echo unfinished >"$stamp"; fi
}

# Fills the new, empty $venv with the packages of $base. Files are hard links: pip replaces files and never writes into
# them, so the two environments cannot disturb each other.
copy_base() {
    if [ "$dry_run" = yes ]; then
        say "# $venv: the packages of $base, as hard links"
        return
    fi
    "$venv/bin/python" -IS - "$base" "$venv" <<'PY'
import os, re, shutil, sys

base, venv = sys.argv[1:]

def link(source, target):
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)

packages = os.path.join("lib", "python%d.%d" % sys.version_info[:2], "site-packages")
shutil.copytree(os.path.join(base, packages), os.path.join(venv, packages), copy_function=link, symlinks=True, dirs_exist_ok=True)
for name in os.listdir(os.path.join(base, "bin")):
    source, target = os.path.join(base, "bin", name), os.path.join(venv, "bin", name)
    if os.path.islink(source) or os.path.exists(target) or name.lower().startswith("activate"):
        continue
    with open(source, "rb") as file:
        content = file.read()
    start = b"\n".join(content.split(b"\n", 2)[:2])
    moved = re.sub(rb"[^\s'\"!]+/bin/python[\d.]*", os.path.join(venv, "bin", "python").encode(), start)
    if start.startswith(b"#!") and moved != start:  # a console script: its first lines name the Python to run it with
        with open(target, "wb") as file:
            file.write(moved + content[len(start):])
        shutil.copymode(source, target)
    else:
        link(source, target)
PY
}

# The packages that only the extras left out ask for.
unwanted() {
    "$venv/bin/python" - "$extras" <<'PY'
import re, sys
from importlib.metadata import requires
chosen = sys.argv[1].split(",")
for requirement in requires("arkv-bench") or []:
    extra = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
    if extra and extra[1] not in chosen:
        print(re.match(r"[\w.-]+", requirement)[0])
PY
}

pip_install() {
    if [ "$dry_run" = yes ]; then
        run "$venv/bin/python" -m pip "$@"
    elif ! "$venv/bin/python" -m pip "$@" >>"$venv/setup.log" 2>&1; then
        tail -n 20 "$venv/setup.log" >&2
        fail "pip failed; its whole output is in $venv/setup.log"
    fi
}

setup_venv() {
    local version major minor from='' pins names
    if [ "$newest" = yes ]; then
        venv=${venv:-$root/.venv-newest}
        [ "$extras_given" = yes ] || extras=dev
    else
        venv=${venv:-$root/.venv}
        [ "$extras_given" = yes ] || extras=$default_extras
    fi
    shown=${venv#"$root"/}
    stamp=$venv/.arkv-setup

    if [ "$dry_run" = no ] && up_to_date; then
        say "Up to date: $shown"
        return
    fi

    # Which Python: the one asked for, that of the environment to update or to copy, or python3.
    if [ -z "$python" ] && [ "$newest" = no ] && [ -x "$venv/bin/python" ]; then python=$venv/bin/python; fi
    if [ "$newest" = yes ]; then
        base=${base:-$root/.venv}
        if [ -z "$python" ] && complete "$base"; then python=$base/bin/python; fi
    fi
    python=${python:-python3}
    version=$(python_version "$python") ||
        fail "$python does not start: install Python 3.10 or newer, or name one with --python"
    IFS=. read -r major minor _ <<<"$version"
    ((major > 3 || (major == 3 && minor >= 10))) ||
        fail "Python 3.10 or newer is needed and $python is $version: name another with --python, such as --python python3.11"
    [ "$newest" = no ] || ((major > 3 || minor >= 11)) ||
        fail "the newest transformers needs Python 3.11 or newer and $python is $version: name another with --python"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python has no venv module (on Debian and Ubuntu: apt-get install python3-venv)"
    if [ -d "$venv" ] && [ -n "$(ls -A "$venv")" ] && [ ! -f "$stamp" ]; then
        fail "$shown exists and was not made by this script: delete it or choose another folder with --venv"
    fi

    lock
    if [ "$dry_run" = no ] && up_to_date; then
        say "Up to date: $shown"
        return
    fi
    if [ "$newest" = yes ] && complete "$base" && [ "$(python_version "$base/bin/python")" = "$version" ]; then
        from=$base
    fi
    if [ -n "$from" ]; then
        say "[1/2] making $shown (Python $version) as a copy of ${from#"$root"/}"
        make_venv --without-pip
        copy_base
        if [ "$dry_run" = no ]; then names=$(unwanted); else names='<packages of the extras left out>'; fi
        # shellcheck disable=SC2086 # one word per package
        if [ -n "$names" ]; then pip_install uninstall -y $names; fi
    elif [ "$(python_version "$venv/bin/python")" = "$version" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        say "[1/2] updating $shown (Python $version)"
        if [ "$dry_run" = no ]; then echo unfinished >"$stamp"; fi
    else
        say "[1/2] making the virtual environment $shown (Python $version)"
        make_venv
    fi

    say "[2/2] installing the pinned packages and this repository${extras:+, extras: $extras} (minutes when new; log: $shown/setup.log)"
    pins=$root/constraints.txt
    if [ "$newest" = yes ]; then
        # A constraint cannot override another: the lines that the second file replaces are left out of the first.
        pins=$venv/constraints.txt
        if [ "$dry_run" = yes ]; then
            say "# $pins: constraints-newest.txt, and the rest from constraints.txt"
        else
            awk -F '==' '/^#/ { next } FNR == NR { newer[$1] = 1; print; next } !($1 in newer)' \
                "$root/constraints-newest.txt" "$root/constraints.txt" >"$pins"
        fi
    fi
    # --no-compile: half the time; Python compiles a module when it is first imported.
    editable
    pip_install install -q --no-compile --progress-bar off -c "$pins" "${checkout[@]}"
    if [ "$dry_run" = no ]; then
        fingerprint >"$stamp"
        say "Ready in $SECONDS s: $shown. Next: $shown/bin/arkv-bench --help"
    fi
}

if [ "$conda" = yes ]; then setup_conda; else setup_venv; fi
