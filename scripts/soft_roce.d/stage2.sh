# Second stage of both guests, as root on a writable view of the host's files: make the NICs, run the
# command, leave its status in the control folder, switch off.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
control=/run/soft_roce
. $control/conf # kind, hostname, num_nics, topology, delay_ms, loss_pct, writable

finish() {
    sync
    exec busybox poweroff -f
}
fail() {
    echo "$1" >$control/error
    finish
}

# ---- files and output ------------------------------------------------------------------------
mkdir -p /dev/shm /dev/pts /run/lock
mount -t tmpfs -o mode=1777,size=80% shm /dev/shm
mount -t devpts devpts /dev/pts
ln -sfn /proc/self/fd /dev/fd
for name in 0:stdin 1:stdout 2:stderr; do ln -sfn /proc/self/fd/${name%:*} /dev/${name#*:}; done
hostname "$hostname"

case $kind in
    uml)
        out=/dev/tty1 err=/dev/tty2
        for tty in $out $err; do stty -F $tty raw -echo -opost || fail "no $tty for the output"; done
        ;;
    qemu)
        port() {
            local sys
            for sys in /sys/class/virtio-ports/*; do
                [ "$(cat "$sys/name" 2>/dev/null)" = "$1" ] && echo "/dev/${sys##*/}"
            done
        }
        for ((i = 0; i < 100; i++)); do
            out=$(port out) err=$(port err)
            [ -c "$out" ] && [ -c "$err" ] && break
            sleep 0.1
        done
        [ -c "$out" ] && [ -c "$err" ] || fail 'no virtio ports for the output'
        ;;
esac

for ((i = 0; i < ${#writable[@]}; i++)); do
    folder=${writable[i]}
    mkdir -p "$folder"
    if [ $kind = uml ]; then
        mount -t hostfs -o "$folder" none "$folder"
    else
        mount -t 9p -o trans=virtio,version=9p2000.L,cache=mmap,msize=262144 rw$i "$folder"
    fi || fail "cannot mount $folder for writing"
done

# ---- NICs ------------------------------------------------------------------------------------
# All are in the first network namespace, since rxe opens its UDP socket there only. Traffic between
# two of them would be short-cut through lo, where rxe drops it. So the table of local addresses is
# looked up after one table for each NIC, chosen by the device that a packet leaves by: the packet
# crosses the virtual wire.
set_nics() {
    local i key
    ip link set lo up
    ip link del dummy0 2>/dev/null # the driver's own
    for key in all default; do
        echo 0 >/proc/sys/net/ipv4/conf/$key/rp_filter
        echo 1 >/proc/sys/net/ipv4/conf/$key/accept_local
        echo 1 >/proc/sys/net/ipv4/conf/$key/arp_ignore
        echo 2 >/proc/sys/net/ipv4/conf/$key/arp_announce
        echo 0 >/proc/sys/net/ipv6/conf/$key/accept_dad
    done
    {
        if [ $topology = bridge ]; then
            echo 'link add br0 mtu 9000 type bridge'
            echo 'link set br0 up'
        fi
        for ((i = 0; i < num_nics; i++)); do
            if [ $topology = bridge ]; then
                echo "link add nic$i mtu 9000 type veth peer name sw$i mtu 9000"
                echo "link set sw$i master br0 up"
            else
                echo "link add nic$i mtu 9000 type dummy"
            fi
            echo "link set nic$i up"
            echo "addr add 10.77.0.$((i + 1))/24 dev nic$i noprefixroute"
            echo "route add local 10.77.0.$((i + 1)) dev nic$i table $((100 + i))"
            echo "route add 10.77.0.0/24 dev nic$i src 10.77.0.$((i + 1)) table $((100 + i))"
            echo "rule add pref $((10 + i)) oif nic$i lookup $((100 + i))"
        done
        [ "$num_nics" -gt 0 ] && echo 'route add 10.77.0.0/24 dev nic0'
        echo 'rule add pref 1000 lookup local'
        echo 'rule del pref 0'
    } >/run/ip.batch
    ip -batch /run/ip.batch || return 1
    for ((i = 0; i < num_nics; i++)); do
        rdma link add rxe$i type rxe netdev nic$i || return 1
        if [ "${delay_ms[i]}" != 0 ] || [ "${loss_pct[i]}" != 0 ]; then
            # The limit is in packets: the default of 1000 would drop bursts, and call that loss.
            tc qdisc add dev nic$i root netem limit 1000000 \
                delay "${delay_ms[i]}ms" loss "${loss_pct[i]}%" || return 1
        fi
    done
}
set_nics >/dev/kmsg 2>&1 || fail 'cannot make the NICs'
for ((i = 0; i < num_nics; i++)); do
    for ((k = 0; k < 100; k++)); do
        state=$(cat /sys/class/infiniband/rxe$i/ports/1/state)
        case $state in *ACTIVE*) continue 2 ;; esac
        sleep 0.05
    done
    fail "rxe$i is not active: $state"
done

# ---- the command -----------------------------------------------------------------------------
ulimit -l unlimited
ulimit -n 65536
cut -d' ' -f1 /proc/uptime >$control/ready
mkfifo /run/out /run/err
cat </run/out >"$out" &
out_pid=$!
cat </run/err >"$err" &
err_pid=$!
env -i /bin/bash $control/command </dev/null >/run/out 2>/run/err
status=$?
# A process that the command left behind may hold its output open: two seconds, then it is cut.
(
    sleep 2
    kill $out_pid $err_pid 2>/dev/null
) &
wait $out_pid $err_pid
[ $kind = uml ] && for tty in $out $err; do stty -F $tty drain raw -echo -opost; done
cut -d' ' -f1 /proc/uptime >$control/end
echo $status >$control/status.new
mv $control/status.new $control/status
finish
