#!/bin/busybox sh
# The first process in the virtual machine, in its initramfs: mounts this machine's root file system
# read-only, with a writable layer in memory, and starts guest.sh in it.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
for module in /modules/*; do
    $b insmod "$module" || $b echo "injector: cannot load $module"
done
stop() {
    $b echo "injector: $1"
    $b poweroff -f
}
$b mount -t virtiofs -o ro root /lower || stop "cannot mount the root file system"
$b mount -t tmpfs -o size=80%,mode=755 layer /layer
$b mkdir /layer/upper /layer/work
$b mount -t overlay -o lowerdir=/lower,upperdir=/layer/upper,workdir=/layer/work root /new ||
    stop "cannot mount the writable layer"
for folder in proc sys dev; do
    $b mount --move /$folder /new/$folder
done
$b cp -r /guest /new/.guest
exec $b switch_root /new /bin/sh /.guest/guest.sh
