#!/bin/bash
# The CPU image without docker and without a registry of images:
#
#     tools/image.sh build    a Debian made by debootstrap, then the Dockerfile, by buildah
#     tools/image.sh test     runs the image: its version, its user, and two iterations of its demo, with the scores
#                             before and after (some minutes; the model comes from the package index)
#
# IMAGE names it, IMAGE_FOLDER holds the base system and the images (default ~/.cache/megatron-peft/image), DEBIAN_MIRROR
# is where Debian comes from. pip's own settings hold within the build; files and folders that they name are mounted.
# Where these give a torch that was built on a newer Debian, LIBC_RELEASE=trixie takes the C library from there.
set -euo pipefail
cd "$(dirname "$0")/.."

IMAGE=${IMAGE:-megatron-peft:cpu}
FOLDER=${IMAGE_FOLDER:-$HOME/.cache/megatron-peft/image}
MIRROR=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
RELEASE=bookworm # its Python is 3.11
BASE=localhost/megatron-peft-base:$RELEASE
WITH_LIBC=$BASE${LIBC_RELEASE:+-libc-$LIBC_RELEASE}
# Ours: to raise them to buildah's own would need a right that root of a container lacks.
LIMITS=(--ulimit "nofile=$(ulimit -Sn):$(ulimit -Hn)" --ulimit "nproc=$(ulimit -Su):$(ulimit -Hu)")
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs

fail() {
    echo "$*" >&2
    exit 1
}

need() {
    [ "$(id -u)" = 0 ] || fail "make $1 changes the owners of files: run it as root, or use docker build ($2)."
    for program in buildah debootstrap; do
        command -v "$program" >/dev/null ||
            fail "make $1 needs $program: apt-get install buildah debootstrap netavark, or use docker build ($2)."
    done
    mkdir -p "$FOLDER"
}

store() {
    buildah --root "$FOLDER/images" --runroot "$FOLDER/run" "$@"
}

# pip's settings as a pip.conf, and a --volume for each file or folder that they name.
pip_settings() {
    local key value
    echo "[global]" >"$FOLDER/pip.conf"
    volumes=(--volume "$FOLDER/pip.conf:/etc/pip.conf:ro")
    declare -A settings=()
    while IFS='=' read -r key value; do
        value=${value#\'}
        # pip lists the environment first, which wins over its files.
        [ -v "settings[${key##*.}]" ] || settings[${key##*.}]=${value%\'}
    done < <(python3 -m pip config list)
    for key in "${!settings[@]}"; do
        echo "$key = ${settings[$key]}" >>"$FOLDER/pip.conf"
        case ${settings[$key]} in
        /*) [ ! -e "${settings[$key]}" ] || volumes+=(--volume "${settings[$key]}:${settings[$key]}:ro") ;;
        esac
    done
}

build() {
    need image docs/install.md
    if ! store inspect --type image "$BASE" >/dev/null 2>&1; then
        local system=$FOLDER/system
        # debootstrap leaves /proc mounted if it is stopped, and deleting through that would reach the machine's own.
        ! grep -q " $system/" /proc/mounts || fail "$system holds mounts of an earlier try: umount them first."
        rm -rf --one-file-system "$system"
        debootstrap --variant=minbase --include=ca-certificates "$RELEASE" "$system" "$MIRROR" ||
            fail "debootstrap got no Debian $RELEASE from $MIRROR: DEBIAN_MIRROR names another mirror."
        local container
        container=$(store from scratch)
        store add --quiet "$container" "$system" / >/dev/null
        store commit --quiet --rm "$container" "$BASE" >/dev/null
        rm -rf --one-file-system "$system"
    fi
    if ! store inspect --type image "$WITH_LIBC" >/dev/null 2>&1; then
        local newer
        newer=$(store from --pull=never "${LIMITS[@]}" "$BASE")
        store run "$newer" -- sh -euc "
            echo 'deb $MIRROR $LIBC_RELEASE main' >/etc/apt/sources.list.d/libc.list
            printf 'Package: *\nPin: release n=$LIBC_RELEASE\nPin-Priority: 100\n' >/etc/apt/preferences.d/libc
            apt-get update -qq
            DEBIAN_FRONTEND=noninteractive apt-get install --yes -qq --target-release $LIBC_RELEASE libc6 libstdc++6 libgomp1
            rm -rf /var/lib/apt/lists/*"
        store commit --quiet --rm "$newer" "$WITH_LIBC" >/dev/null
    fi
    pip_settings
    store build --pull=never "${LIMITS[@]}" --build-arg CPU_BASE="$WITH_LIBC" "${volumes[@]}" --tag "$IMAGE" .
    echo "$IMAGE: $(store images --format '{{.Size}}' "$IMAGE")"
}

test_image() {
    need test-image docs/install.md
    store inspect --type image "$IMAGE" >/dev/null 2>&1 || fail "There is no image $IMAGE yet: make image."
    local container
    container=$(store from --pull=never "${LIMITS[@]}" "$IMAGE")
    # shellcheck disable=SC2064
    trap "store rm '$container' >/dev/null" EXIT
    pip_settings
    # shellcheck disable=SC2016 # these are for the shell within
    store run "${volumes[@]}" "$container" -- bash -euc '
        [ "$(id -u)" = 10001 ] || { echo "runs as uid $(id -u)"; exit 1; }
        megatron-peft --version
        megatron-peft demo --train-iters 2 --output /tmp/demo
        test -s /tmp/demo/report.json && test -s /tmp/demo/report.png
        cat /tmp/demo/lora/checkpoints/latest_checkpointed_iteration.txt
    '
    echo "$IMAGE: the demo ran; $(store images --format '{{.Size}}' "$IMAGE")"
}

case ${1:-} in
build) build ;;
test) test_image ;;
*) fail "usage: tools/image.sh build|test" ;;
esac
