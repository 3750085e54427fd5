# Listener file for i-MSCP 1.4 and later: lets Postfix ask the policy agent of Postmeter.
#
# Copyright (C) 2026 The Postmeter authors
# SPDX-License-Identifier: Apache-2.0
#
# Install the agent first (roles/postmeter with postmeter_postfix: false, or the Salt formula with postfix: false), then
# copy this file to /etc/imscp/listeners.d and run the i-MSCP installer again:
#
#   cp 70_postfix_postmeter.pl /etc/imscp/listeners.d/
#   perl /var/www/imscp/engine/setup/imscp-reconfigure -dan
#   postmeter lint /etc/postmeter/limits.yaml     # also looks at how Postfix is wired
#
# The installer writes main.cf anew each time, so that removing this file and running it again undoes all of this.

package Listener::Postfix::Postmeter;

use strict;
use warnings;
use iMSCP::EventManager;
use Servers::mta;

#
## Configuration variables
#

# How Postfix reaches the agent, as behind check_policy_service.
my $SERVICE = '{ unix:private/postmeter, timeout=10s }';

# The same place as seen from outside of Postfix's chroot. While nothing is there, Postfix is left as it is: it would
# defer all mail.
my $SOCKET = '/var/spool/postfix/private/postmeter';

#
## Please, don't edit anything below this line
#

# After the other listeners, which may add permits to the same lists: hence the low priority.
iMSCP::EventManager->getInstance()->register(
    'afterMtaBuildConf',
    sub {
        return 0 unless -S $SOCKET;

        my $entry = 'check_policy_service $postmeter';
        Servers::mta->factory()->postconf(
            (
                postmeter                      => { action => 'replace', values => [ $SERVICE ] },
                # It looks, ahead of everything that permits; or those who log in would never be looked at.
                smtpd_recipient_restrictions   => { action => 'add', before => qr/permit/, values => [ $entry ] },
                smtpd_data_restrictions        => { action => 'add', before => qr/permit/, values => [ $entry ] },
                # It counts.
                smtpd_end_of_data_restrictions => { action => 'add', before => qr/permit/, values => [ $entry ] }
            )
        );
    },
    -98
);

1;
__END__
