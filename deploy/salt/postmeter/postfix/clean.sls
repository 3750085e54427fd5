---
postmeter-postfix-clean-main-cf:
  postmeter_postfix.unwired: []

postmeter-postfix-clean-reload:
  cmd.run:
    - name: postfix reload
    - onlyif: postfix status
    - onchanges:
      - postmeter_postfix: postmeter-postfix-clean-main-cf
