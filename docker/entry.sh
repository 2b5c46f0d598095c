#!/bin/sh
# hvd-lb-entry COMMAND...: runs a command in the image with an account and a home for the uid it was started with.
#
# `docker run --user UID:GID` gives any uid, so that what is written to a mounted folder belongs to its user; ssh,
# sshd and Python's getpass insist on a name for it. Every uid but root's is called hvd-lb, so that ssh from one
# container to another asks for the right account. Below 500 it stays without, and without ssh.
set -eu

uid=$(id -u)
if ! getent passwd "$uid" >/dev/null; then
    # The group is what the system takes from that file, and not looked at: a process keeps the ones it has.
    echo "hvd-lb:x:$uid:1000:hvd-lb:/home/hvd-lb:/bin/bash" >/var/lib/extrausers/passwd
fi
home=$(getent passwd "$uid" | cut -d: -f6)
export HOME="${home:-/home/hvd-lb}"
exec "$@"
