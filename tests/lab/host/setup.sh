#!/bin/sh
# NAME
#   setup.sh - make a debootstrapped tree the base of the lab's hosts
#
# SYNOPSIS
#   setup.sh TREE PUBLIC_KEY
#
# DESCRIPTION
#   Sets up what all hosts of the lab have in common: root logs in with the key, Postfix takes mail on ports 25 and 587
#   from the users user1@example.com to user9@example.com with the password "letter-box", and throws it away. What would
#   disturb short-lived hosts (timers, gettys) is masked.
set -eu

tree=$1
key=$2
here=$(dirname "$0")

install -d -m 700 "$tree/root/.ssh"
install -m 600 "$key" "$tree/root/.ssh/authorized_keys"

cp "$here/main.cf" "$tree/etc/postfix/main.cf"
chroot "$tree" /bin/sh -eu <<'INSIDE'
postconf -M submission/inet="submission inet n - y - - smtpd"
postconf -P submission/inet/syslog_name=postfix/submission
printf 'pwcheck_method: auxprop\nauxprop_plugin: sasldb\nmech_list: PLAIN LOGIN\n' >/etc/postfix/sasl/smtpd.conf
for number in 1 2 3 4 5 6 7 8 9; do
    printf 'letter-box' | saslpasswd2 -p -c -u example.com "user$number"
done
# smtpd is chrooted: users where it looks for them.
install -D -o root -g postfix -m 640 /etc/sasldb2 /var/spool/postfix/etc/sasldb2

systemctl disable -q etcd.service
systemctl enable -q postfix.service
systemctl mask -q apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer \
    logrotate.timer man-db.timer systemd-tmpfiles-clean.timer console-getty.service getty.target \
    systemd-networkd.service systemd-resolved.service systemd-timesyncd.service 2>/dev/null
rm -rf /var/cache/apt/archives/*.deb /var/lib/etcd/default /etc/machine-id /var/lib/dbus/machine-id
touch /etc/machine-id
INSIDE
