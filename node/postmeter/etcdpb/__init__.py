"""Made by `make proto` from proto/postmeter/etcdpb: not to be edited."""
