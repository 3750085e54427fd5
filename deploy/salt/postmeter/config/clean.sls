---
include:
  - postmeter.service.clean

postmeter-config-clean-directory:
  file.absent:
    - name: /etc/postmeter
    - require:
      - sls: postmeter.service.clean
