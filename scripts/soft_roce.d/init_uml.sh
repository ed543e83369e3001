#!/bin/bash
# First program of the uml guest: make a writable view of the host's files, go on in it.
# The root is the host's / read-only; this file lies in the control folder of the run.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
control=${0%/*}
fail() {
    echo "$1" >/dev/kmsg
    busybox poweroff -f
}
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs -o size=70% tmpfs /mnt
mkdir /mnt/upper /mnt/work /mnt/root
mount -t overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work overlay /mnt/root ||
    fail 'cannot mount the overlay'
for folder in proc sys dev; do mount --bind /$folder /mnt/root/$folder; done
mkdir -p /mnt/root/run
mount -t tmpfs run /mnt/root/run
mkdir /mnt/root/run/soft_roce
mount -t hostfs -o "$control" none /mnt/root/run/soft_roce || fail 'cannot mount the control folder'
exec chroot /mnt/root /bin/bash /run/soft_roce/stage2.sh
