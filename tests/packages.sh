#!/bin/sh
# NAME
#   packages.sh - install the Debian packages that the tests need, without starting a daemon
#
# SYNOPSIS
#   tests/packages.sh [NAME...]
#
# DESCRIPTION
#   Installs those of the named packages that are missing; without a name, those listed in packages.txt beside this
#   file. When all are there it says nothing and asks the network nothing, so it may run before every test run.
#
#   The tests start private instances of Postfix, Dovecot and the rest, on ports of their own. Debian's packages would
#   start the system's instances as well: a policy-rc.d(8) that says no (exit 101) keeps them from it. It is made only
#   where there is none, and taken away again.
#
# DIAGNOSTICS
#   0 all there · 1 something is missing and could not be installed · 2 packages.txt is missing
set -eu

listed="$(dirname "$0")/packages.txt"
gate=/usr/sbin/policy-rc.d

if [ $# -eq 0 ]; then
    [ -r "$listed" ] || { echo "packages.sh: name packages, or list them in $listed" >&2; exit 2; }
    # shellcheck disable=SC2046  # one package name a line, split on purpose
    set -- $(sed 's/#.*//' "$listed")
fi

missing=
for name in "$@"; do
    state=$(dpkg-query --show --showformat '${db:Status-Status}' "$name" 2>/dev/null || true)
    [ "$state" = installed ] || missing="$missing $name"
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" -ne 0 ]; then
    echo "packages.sh: missing:$missing. Only root can install them: sudo $0$missing" >&2
    exit 1
fi

made_gate=
restore() { [ -z "$made_gate" ] || rm -f "$gate"; }
trap restore EXIT
trap 'exit 1' HUP INT TERM
if [ ! -e "$gate" ]; then
    made_gate=yes
    printf '#!/bin/sh\nexit 101\n' >"$gate"
    chmod 755 "$gate"
fi

echo "packages.sh: installing$missing"
export DEBIAN_FRONTEND=noninteractive
apt-get update -q -o DPkg::Lock::Timeout=300
# shellcheck disable=SC2086  # a list of package names, split on purpose
apt-get install -q -y --no-install-recommends -o DPkg::Lock::Timeout=300 $missing </dev/null
