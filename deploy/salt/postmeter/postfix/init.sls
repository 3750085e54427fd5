---
include:
  - postmeter.postfix.wire
