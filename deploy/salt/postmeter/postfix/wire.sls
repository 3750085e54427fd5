{%- from "postmeter/map.jinja" import postmeter with context %}
---
include:
  - postmeter.service

postmeter-postfix-wire-main-cf:
{%- if postmeter.postfix %}
  postmeter_postfix.wired:
    - service: {{ postmeter.postfix_service | json }}
    - probe: {{ postmeter.listen[0] | json }}
    - own_lists: {{ postmeter.postfix_services | json }}
{%- else %}
  postmeter_postfix.unwired:
{%- endif %}
    - require:
      - sls: postmeter.service

postmeter-postfix-wire-reload:
  cmd.run:
    - name: postfix reload
    - onlyif: postfix status
    - onchanges:
      - postmeter_postfix: postmeter-postfix-wire-main-cf
