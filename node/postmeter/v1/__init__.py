"""Made by `make proto` from proto/postmeter/v1: not to be edited."""
