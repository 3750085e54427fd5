---
include:
  - postmeter.service.clean

postmeter-package-clean-releases:
  file.absent:
    - name: /opt/postmeter
    - require:
      - sls: postmeter.service.clean

postmeter-package-clean-command:
  file.absent:
    - name: /usr/local/bin/postmeter
