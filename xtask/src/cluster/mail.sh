#!/bin/bash
# The mail server's pod: Postfix and Dovecot, both on standard and on alternative ports. Both log to
# the container's output. The environment has DOMAIN, NAME (the servers' own) and PASSWORD (of any
# user); /tls has the certificate; /config has this file, and Postfix's own services.
set -e
mkdir -p /t/postfix /t/queue /t/data /t/dovecot/run /t/dovecot/state /t/mail
chown postfix /t/data
id vmail > /dev/null 2>&1 || useradd -r -d /t/mail vmail
chown -R vmail /t/mail
cat > /t/postfix/main.cf <<END
compatibility_level = 3.6
queue_directory = /t/queue
data_directory = /t/data
command_directory = /usr/sbin
daemon_directory = /usr/lib/postfix/sbin
mail_owner = postfix
setgid_group = postdrop
myhostname = $NAME
mydestination = $DOMAIN
local_transport = lmtp:unix:/t/dovecot/run/lmtp
local_recipient_maps =
alias_maps =
inet_interfaces = all
inet_protocols = ipv4
mynetworks = 127.0.0.0/8
maillog_file = /dev/stdout
smtpd_tls_cert_file = /tls/tls.crt
smtpd_tls_key_file = /tls/tls.key
smtpd_tls_security_level = may
smtpd_relay_restrictions = permit_mynetworks, reject_unauth_destination
smtpd_peername_lookup = no
smtpd_client_connection_count_limit = 0
default_process_limit = 300
# Sessions stay open with a NOOP every half second, which Postfix would end after a minute.
smtpd_junk_command_limit = 100000
END
cat > /t/postfix/master.cf <<END
25      inet  n - n - - smtpd
2525    inet  n - n - - smtpd
  -o syslog_name=postfix/proxied25 -o smtpd_upstream_proxy_protocol=haproxy -o smtpd_upstream_proxy_timeout=5s
465     inet  n - n - - smtpd
  -o smtpd_tls_wrappermode=yes
4465    inet  n - n - - smtpd
  -o syslog_name=postfix/proxied465 -o smtpd_tls_wrappermode=yes -o smtpd_upstream_proxy_protocol=haproxy -o smtpd_upstream_proxy_timeout=5s
587     inet  n - n - - smtpd
5587    inet  n - n - - smtpd
  -o syslog_name=postfix/proxied587 -o smtpd_upstream_proxy_protocol=haproxy -o smtpd_upstream_proxy_timeout=5s
END
cat /config/own-services.cf >> /t/postfix/master.cf
cat > /t/dovecot/dovecot.conf <<END
base_dir = /t/dovecot/run
state_dir = /t/dovecot/state
protocols = imap lmtp
log_path = /dev/stderr
listen = *
ssl = yes
ssl_cert = </tls/tls.crt
ssl_key = </tls/tls.key
mail_location = maildir:/t/mail/%n
mail_uid = vmail
mail_gid = vmail
first_valid_uid = 1
auth_verbose = yes
passdb {
  driver = static
  args = password=$PASSWORD
}
userdb {
  driver = static
  args = uid=vmail gid=vmail home=/t/mail/%n
}
haproxy_trusted_networks = 10.0.0.0/24 10.244.0.0/16
haproxy_timeout = 3s
service imap-login {
  inet_listener imap {
    port = 143
  }
  inet_listener imaps {
    port = 993
    ssl = yes
  }
  inet_listener imaps_proxied {
    port = 10993
    ssl = yes
    haproxy = yes
  }
}
service lmtp {
  unix_listener lmtp {
    mode = 0666
  }
}
END
dovecot -F -c /t/dovecot/dovecot.conf &
exec postfix -c /t/postfix start-fg
