{%- from "postmeter/map.jinja" import postmeter, place, etcd with context %}
---
include:
  - postmeter.package

postmeter-config-file-directory:
  file.directory:
    - name: /etc/postmeter/tls
    - makedirs: true
    - mode: "0755"

# The agent's own, so that members of its group, who may use the admin socket, cannot read keys.
{%- for name, text in postmeter.tls.items() %}
postmeter-config-file-tls-{{ name }}:
  file.managed:
    - name: /etc/postmeter/tls/{{ name }}
    - contents: {{ text | json }}
    - user: postmeter
    - group: root
    - mode: "0400"
    - show_changes: false
    - require:
      - file: postmeter-config-file-directory
      - sls: postmeter.package
    - require_in:
      - file: postmeter-config-file-settings
{%- endfor %}

{%- if postmeter.etcd_password %}
postmeter-config-file-etcd-password:
  file.managed:
    - name: /etc/postmeter/etcd.password
    - contents: {{ postmeter.etcd_password | json }}
    - user: postmeter
    - group: root
    - mode: "0400"
    - show_changes: false
    - require:
      - file: postmeter-config-file-directory
      - sls: postmeter.package
{%- endif %}

{%- if not etcd %}
postmeter-config-file-limits:
  file.managed:
    - name: /etc/postmeter/limits.yaml
    - contents: {{ {"limits": postmeter.limits} | json | json }}
    - mode: "0644"
    - check_cmd: {{ place }}/bin/postmeter agent --check --settings /dev/null --limits
    - require:
      - file: postmeter-config-file-directory
      - sls: postmeter.package
    - require_in:
      - file: postmeter-config-file-settings
{%- endif %}

postmeter-config-file-settings:
  file.managed:
    - name: /etc/postmeter/postmeter.yaml
    - contents: {{ ("# Managed by Salt.\n" ~ postmeter.settings | yaml(false)) | json }}
    - mode: "0644"
    - check_cmd: {{ place }}/bin/postmeter agent --check --settings
    - require:
      - file: postmeter-config-file-directory
      - sls: postmeter.package
