#!/usr/bin/env bash
# Runs a command where there is a share of an NFS server: in a Linux that is a process of its own (User Mode Linux), as the kernel
# here need not have a client of NFS. It needs no root. The command is root in there; it sees the files of this machine, and
# cannot change them, but for those in /tmp and /var/tmp, which are not this machine's.
#   dev/nfs.sh COMMAND…   in there `mount -t nfs nfs.example.org:/backups FOLDER` works: NFS 4.2, with the server of Linux. Prints
#                         what the command prints, and ends as it does
# The packages that this takes, of Debian for amd64, are not installed, but unpacked in Cargo's target folder.
set -euo pipefail

packages=(keyutils kmod libnfsidmap1 nfs-common nfs-kernel-server user-mode-linux)

die() {
    echo "nfs.sh: $*" >&2
    exit 125
}

if (($# == 0)); then
    sed -n '5,6s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
target=${CARGO_TARGET_DIR:-$(dirname "$0")/../target}
there=$(realpath -m "$target")/nfs
mkdir -p "$(dirname "$there")"
exec 9>"$there.lock"
flock 9
if [[ ! -e $there/unpacked ]]; then
    rm -rf "$there"
    mkdir -p "$there"/{packages,lib}
    echo "nfs.sh: unpacking ${packages[*]} in $there" >&2
    (cd "$there/packages" && apt-get -q download "${packages[@]}") >"$there/log" 2>&1 ||
        die "the packages were not downloaded, see $there/log"
    for package in "$there"/packages/*.deb; do dpkg-deb --extract "$package" "$there/root"; done
    rm -r "$there/packages"
    # Where modprobe looks.
    ln -s ../root/usr/lib/uml/modules "$there/lib/modules"
    touch "$there/unpacked"
fi
exec 9>&-

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export -p >"$work/environment"
printf '%q ' "$@" >"$work/command"
cat >"$work/init" <<END
#!/bin/bash
# The first process in there.
exec </dev/null
. "$work/environment"
unset TMPDIR
there=$there work=$work folder=$PWD
END
cat >>"$work/init" <<'END'
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /var/tmp
mkdir /var/tmp/{bin,sbin,usual,export,work}
mount -t hostfs hostfs /var/tmp/work -o "$work"
(
    export LD_LIBRARY_PATH=$there/root/usr/lib/x86_64-linux-gnu
    PATH=$there/root/usr/sbin:$there/root/sbin:$PATH:/usr/sbin:/sbin
    # It is known by its name.
    ln -s "$there/root/bin/kmod" /var/tmp/bin/modprobe
    for module in nfsd nfs nfsv4; do /var/tmp/bin/modprobe --dirname "$there" "$module"; done
    ip link set lo up
    # Nowhere else mount looks for mount.nfs.
    mount --bind /usr/sbin /var/tmp/usual
    cp --archive --symbolic-link /var/tmp/usual/. /var/tmp/sbin/
    ln -sf "$there/root/sbin/mount.nfs" /var/tmp/sbin/
    mount --bind /var/tmp/sbin /usr/sbin
    { cat /etc/hosts; echo 127.0.0.1 nfs.example.org; } >/var/tmp/hosts
    mount --bind /var/tmp/hosts /etc/hosts
    for folder in /run /var/lib /var/tmp/export /tmp; do mount -t tmpfs tmpfs "$folder"; done
    mkdir -p /var/lib/nfs/v4recovery
    touch /var/lib/nfs/{etab,rmtab}
    mkdir --mode 777 /var/tmp/export/backups
    mount -t nfsd nfsd /proc/fs/nfsd
    # The least that it takes: nobody has locks of an earlier server.
    echo 10 >/proc/fs/nfsd/nfsv4gracetime
    exportfs -o rw,no_root_squash,insecure,fsid=0,no_subtree_check '*:/var/tmp/export'
    rpc.mountd --no-nfs-version 2 --no-nfs-version 3
    rpc.nfsd --no-nfs-version 3 2
) >/var/tmp/work/log 2>&1
cd "$folder"
eval "$(</var/tmp/work/command)" >/var/tmp/work/stdout 2>/var/tmp/work/stderr
echo $? >/var/tmp/work/code
sync
echo o >/proc/sysrq-trigger
sleep 10
END
chmod +x "$work/init"
"$there/root/usr/bin/linux.uml" mem=2G rootfstype=hostfs rootflags=/ ro "init=$work/init" con=null con0=null,fd:1 quiet \
    >"$work/console" 2>&1 </dev/null || true
[[ -e $work/code ]] || die "nothing came of it: $(tail -5 "$work/console") $(cat "$work/log" 2>/dev/null)"
cat "$work/stdout"
cat "$work/stderr" >&2
exit "$(<"$work/code")"
