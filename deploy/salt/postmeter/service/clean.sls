---
include:
  - postmeter.postfix.clean

postmeter-service-clean-service:
  service.dead:
    - name: postmeter
    - enable: false
    - require:
      - sls: postmeter.postfix.clean

postmeter-service-clean-socket:
  service.dead:
    - name: postmeter.socket
    - enable: false
    - require:
      - service: postmeter-service-clean-service

{%- for path in [
    "/etc/systemd/system/postmeter.service",
    "/etc/systemd/system/postmeter.socket",
    "/etc/systemd/system/postmeter.socket.d",
    "/var/spool/postfix/private/postmeter",
] %}
postmeter-service-clean-{{ path }}:
  file.absent:
    - name: {{ path }}
    - require:
      - service: postmeter-service-clean-socket
    - onchanges_in:
      - module: postmeter-service-clean-reload
{%- endfor %}

postmeter-service-clean-reload:
  module.run:
    - service.systemctl_reload: []
