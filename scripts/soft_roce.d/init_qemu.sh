#!/bin/busybox sh
# First program of the qemu guest: load modules, make a writable view of the host's files, go on in it.
b=/bin/busybox
fail() {
    echo "$1" >/dev/kmsg
    $b poweroff -f
}
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs dev /dev
while read -r module; do
    $b insmod "/modules/$module" || echo "insmod $module failed" >/dev/kmsg
done </order

$b mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=1048576 host /lower ||
    fail 'cannot mount the files of the host'
$b mount -t tmpfs -o size=60% tmpfs /upper
$b mkdir /upper/files /upper/work
$b mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work overlay /root ||
    fail 'cannot mount the overlay'
for folder in proc sys dev; do $b mount --move /$folder /root/$folder; done
$b mkdir -p /root/run
$b mount -t tmpfs run /root/run
$b mkdir /root/run/soft_roce
$b mount -t 9p -o trans=virtio,version=9p2000.L,cache=none,msize=262144 control /root/run/soft_roce ||
    fail 'cannot mount the control folder'
exec $b switch_root /root /bin/bash /run/soft_roce/stage2.sh
