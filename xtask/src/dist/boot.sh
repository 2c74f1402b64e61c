#!/bin/sh
# Runs in a booted Debian that has the package, as root. Every line has to succeed.
set -eux
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
finish() {
    journalctl --unit portfwd --no-pager | tail -n 30
}
trap finish EXIT
for side in wan lan; do
    ip link add "${side}0" type veth peer name "${side}1"
    ip link set "${side}0" up
    ip link set "${side}1" up
done
echo 'PORTFWD_OPTIONS="--wan wan0 --lan lan0 --max-flows 10000"' > /etc/default/portfwd
main_pid() {
    systemctl show --property MainPID --value portfwd
}
links() {
    find /sys/fs/bpf/portfwd/default -path '*/links/*' | sort
}

# Started, it is ready, confined, and at work.
systemctl enable --now portfwd
systemctl is-enabled portfwd
portfwd status
portfwd add tcp 8080 10.0.0.2 --name web
systemd-analyze security portfwd.service
grep -q '^Seccomp:.*2' "/proc/$(main_pid)/status"
grep -q '^NoNewPrivs:.*1' "/proc/$(main_pid)/status"
test "$(stat --format '%U:%G %a' /run/portfwd/default.sock)" = 'root:portfwd 660'
test "$(stat --format '%U %a' /var/lib/portfwd/default.redb)" = 'root 600'
links > /before
test -s /before

# Told to, it reads its configuration, and leaves alone what was added by hand.
mkdir -p /etc/portfwd/conf.d
printf '[[rule]]\nname = "mail"\nproto = "tcp"\nlisten = "25"\ntarget = "10.0.0.3"\n' > /etc/portfwd/conf.d/mail.toml
systemctl reload portfwd
portfwd rules | grep -q mail
portfwd rules | grep -q web

# Restarted and stopped, it leaves everything attached.
systemctl restart portfwd
portfwd rules | grep -q web
systemctl stop portfwd
links | cmp /before
portfwd rules | grep -q web
systemctl start portfwd

# Standing still, it is killed and started again.
mkdir -p /run/systemd/system/portfwd.service.d
printf '[Service]\nWatchdogSec=3s\n' > /run/systemd/system/portfwd.service.d/impatient.conf
systemctl daemon-reload
systemctl restart portfwd
former=$(main_pid)
kill -STOP "$former"
attempts=0
until portfwd status && test "$(main_pid)" != "$former"; do
    attempts=$((attempts + 1))
    test "$attempts" -lt 60
    sleep 1
done
journalctl --unit portfwd --no-pager | grep -q 'Watchdog timeout'
links | cmp /before

# Removed, it leaves nothing attached.
dpkg --remove portfwd
test ! -e /sys/fs/bpf/portfwd/default
test -e /var/lib/portfwd/default.redb
trap - EXIT
systemctl --no-block exit 0
