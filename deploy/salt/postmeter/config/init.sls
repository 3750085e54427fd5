---
include:
  - postmeter.config.file
