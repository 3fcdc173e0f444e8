#!/bin/sh
# Continues in the root file system: mounts what a running system has, runs the command, reports its
# exit code and turns the machine off.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
read -r up _ < /proc/uptime
port() {
    for port in /sys/class/virtio-ports/*; do
        [ "$(cat "$port/name")" = "$1" ] && echo "/dev/${port##*/}"
    done
}
output=$(port output)
exec 7>> "$(port status)"
echo "booted $up" >&7

mount -t tmpfs -o mode=755 run /run
mount -t tmpfs -o mode=1777,size=60% tmp /tmp
mkdir -p /dev/pts /dev/shm /run/lock /var/tmp
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
ln -sfn /proc/self/fd /dev/fd
ln -sfn /proc/self/fd/0 /dev/stdin
ln -sfn /proc/self/fd/1 /dev/stdout
ln -sfn /proc/self/fd/2 /dev/stderr
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t debugfs debug /sys/kernel/debug
mount -t tracefs trace /sys/kernel/tracing 2> /dev/null
release=$(uname -r)
mkdir -p "/lib/modules/$release"
mount --bind "$(cat /.guest/modules)" "/lib/modules/$release"
ip link set lo up
hostname injector-guest 2> /dev/null
ulimit -n 1048576

(cd / && exec setsid sh /.guest/command < /dev/null) >> "$output" 2>&1 7>&-
echo "exited $?" >&7
sync
echo o > /proc/sysrq-trigger
sleep 10
