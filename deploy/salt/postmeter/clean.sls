---
# Postfix first, so that it never asks an agent that is gone.
include:
  - postmeter.postfix.clean
  - postmeter.service.clean
  - postmeter.config.clean
  - postmeter.package.clean
