{%- from "postmeter/map.jinja" import postmeter, place, etcd with context %}
---
include:
  - postmeter.config

postmeter-service-running-release:
  file.symlink:
    - name: /opt/postmeter/current
    - target: {{ postmeter.version }}
    - require:
      - sls: postmeter.config

postmeter-service-running-command:
  file.symlink:
    - name: /usr/local/bin/postmeter
    - target: /opt/postmeter/current/bin/postmeter

postmeter-service-running-service-unit:
  file.managed:
    - name: /etc/systemd/system/postmeter.service
    - source: salt://postmeter/files/postmeter.service
    - mode: "0644"
    - require:
      - file: postmeter-service-running-release

postmeter-service-running-socket-unit:
  file.managed:
    - name: /etc/systemd/system/postmeter.socket
    - source: salt://postmeter/files/postmeter.socket
    - mode: "0644"
    - require:
      - file: postmeter-service-running-release

# Where it listens, if not where the unit says.
postmeter-service-running-listen:
{%- if postmeter.listen == ["/var/spool/postfix/private/postmeter"] %}
  file.absent:
    - name: /etc/systemd/system/postmeter.socket.d/listen.conf
{%- else %}
  file.managed:
    - name: /etc/systemd/system/postmeter.socket.d/listen.conf
    - contents:
        - "[Socket]"
        - "ListenStream="
{%- for listen in postmeter.listen %}
        - "ListenStream={{ listen }}"
{%- endfor %}
    - makedirs: true
    - mode: "0644"
{%- endif %}

postmeter-service-running-reload:
  module.run:
    - service.systemctl_reload: []
    - onchanges:
      - file: postmeter-service-running-service-unit
      - file: postmeter-service-running-socket-unit
      - file: postmeter-service-running-listen

# The socket can change only while nobody holds it. Postfix tries again after a second.
postmeter-service-running-socket:
  cmd.run:
    - name: systemctl stop postmeter.service && systemctl restart postmeter.socket
    - onchanges:
      - file: postmeter-service-running-socket-unit
      - file: postmeter-service-running-listen
    - require:
      - module: postmeter-service-running-reload

postmeter-service-running-service:
  service.running:
    - name: postmeter
    - enable: true
    - require:
      - file: postmeter-service-running-release
      - cmd: postmeter-service-running-socket
    - watch:
      - file: postmeter-service-running-release
      - file: postmeter-service-running-service-unit
      - file: /etc/postmeter/postmeter.yaml
{%- if not etcd %}
      - file: /etc/postmeter/limits.yaml
{%- endif %}

postmeter-service-running-health:
  cmd.run:
    - name: /opt/postmeter/current/bin/postmeter health --wait {{ postmeter.health_timeout }}
    - onchanges:
      - service: postmeter-service-running-service
    - failhard: true

{%- if etcd %}
{%- if postmeter.etcd_package %}
postmeter-service-running-etcdctl:
  pkg.installed:
    - name: {{ postmeter.etcd_package }}
{%- endif %}
{%- for name, limit in postmeter.limits.items() %}
{%- set key = etcd.get("prefix", "/postmeter/") ~ "limits/" ~ name %}
# A transaction that does nothing if there is one: what the operator changed stays.
postmeter-service-running-limit-{{ name }}:
  cmd.run:
    - name: etcdctl txn
    - stdin: {{ ('create("' ~ key ~ '") = "0"\n\nput ' ~ key ~ " " ~ (limit | json | json) ~ "\n\n\n") | json }}
    - unless: etcdctl get --keys-only {{ key }} | grep -q .
    - env:
      - ETCDCTL_API: "3"
      - ETCDCTL_ENDPOINTS: {{ etcd.endpoints | join(",") }}
{%- if etcd.ca is defined %}
      - ETCDCTL_CACERT: {{ etcd.ca }}
{%- endif %}
{%- if etcd.certificate is defined %}
      - ETCDCTL_CERT: {{ etcd.certificate }}
      - ETCDCTL_KEY: {{ etcd.key }}
{%- endif %}
{%- if etcd.user is defined %}
      - ETCDCTL_USER: {{ etcd.user }}:{{ postmeter.etcd_password }}
{%- endif %}
    - require:
      - cmd: postmeter-service-running-health
{%- endfor %}
{%- endif %}
