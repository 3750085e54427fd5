---
include:
  - postmeter.service.running
