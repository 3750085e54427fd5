# Postmeter. `make run` and `make test` are all that a newcomer needs; both set up what is missing first.

PYTHON ?= $(firstword $(wildcard /usr/bin/python3) python3)
BIN := .venv/bin
READY := .venv/ready

.PHONY: help run cluster test cluster-test lint bench simulate lab lab-test proto lock clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

run: $(READY) ## run the agent here: Postfix asks at 127.0.0.1:10040, limits from deploy/examples/limits.yaml
	@mkdir -p build
	$(BIN)/postmeter agent --limits deploy/examples/limits.yaml --state-dir build/state \
	    --admin-socket build/admin.sock

cluster: $(READY) ## try three agents and etcd here: Postfix asks at 127.0.0.1:10041 to 10043
	@tests/packages.sh etcd-server etcd-client
	$(BIN)/python deploy/cluster/cluster.py build/cluster

test: $(READY) lint ## run all tests (as root: with real Postfix, and what it needs from Debian is installed)
	@tests/packages.sh || [ "$$(id -u)" -ne 0 ]
	$(BIN)/pytest -n 2 --dist loadfile

lint: $(READY) ## check style and types
	$(BIN)/ruff format --check -q .
	$(BIN)/ruff check -q .
	$(BIN)/mypy node tests

bench: $(READY) ## measure the agent beside a C echo server, postfwd and policyd-rate-limit
	@tests/packages.sh
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python -m tests.bench

RUNS ?= 3
cluster-test: $(READY) ## real clusters while their network is cut and their nodes die, a quarter of an hour: as root
	@tests/packages.sh
	$(BIN)/python -m tests.cluster --seeds $(RUNS)

SEEDS ?= 0:10000
WHAT ?= chaos
simulate: $(READY) ## run a cluster through random trouble: make simulate SEEDS=0:10000 [WHAT=liveness|healthy]
	$(BIN)/python -m tests.simulation $(WHAT) --seeds $(SEEDS)

lab: $(READY) ## boot Debian hosts with a cluster on this machine, to watch it and to break it (as root)
	@tests/packages.sh
	$(BIN)/python -m tests.lab

lab-test: $(READY) ## run all tests on the lab's hosts, half an hour (as root)
	@tests/packages.sh
	POSTMETER_LAB=all $(BIN)/pytest tests/lab

proto: $(READY) ## generate node/postmeter/v1 and etcdpb from proto/
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=node --pyi_out=node --grpc_python_out=node \
	    proto/postmeter/*/*.proto

lock: ## pin the newest versions that pyproject.toml admits
	uv pip compile pyproject.toml --group dev --universal --generate-hashes --no-annotate --no-header --upgrade -q \
	    -o tests/requirements.lock
	uv pip compile tests/lab/requirements.in --python-version 3.11 --universal --generate-hashes --no-annotate \
	    --no-header --upgrade -q -o tests/lab/requirements.lock
	uv pip compile tests/lab/salt.in --python-version 3.11 --universal --generate-hashes --no-annotate \
	    --no-header --upgrade -q -o tests/lab/salt.lock

clean: ## remove everything that was made here
	rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(READY): pyproject.toml tests/requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Postmeter needs Python 3.11 or later; name one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || tests/packages.sh python3-venv
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r tests/requirements.lock
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
