---
include:
  - postmeter.package
  - postmeter.config
  - postmeter.service
  - postmeter.postfix
