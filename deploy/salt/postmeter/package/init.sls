---
include:
  - postmeter.package.install
