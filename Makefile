# Short names for what people and CI run. All of them work on a fresh checkout.
.DEFAULT_GOAL := help
.PHONY: help setup demo check test test-long test-vllm test-trl test-engines bench clean

BIN := .venv/bin

export PATH := $(CURDIR)/$(BIN):$(PATH)

help:
	@echo "make setup      .venv with pinned packages and the compiled extension"
	@echo "make demo       train and serve a small model on this machine, weights moved every step"
	@echo "make check      format, lint, types, spelling, who may import whom"
	@echo "make test       what CI runs"
	@echo "make test-long  the same tests with the full counts"
	@echo "make test-vllm  real vLLM engines, in an environment of their own (made once: minutes, 4 GB)"
	@echo "make test-trl   real Trainer and TRL runs that drive vLLM, in two environments of their own"
	@echo "make test-engines  real Megatron-Core and DeepSpeed ranks and SGLang classes, in environments of their own"
	@echo "make bench      measure transfers on this machine, one JSON object"
	@echo "make clean      remove build outputs and caches, keep .venv"

setup:
	@scripts/setup

demo: setup
	@$(BIN)/weightsync demo

check: setup
	@scripts/check

test: setup
	@$(BIN)/pytest

test-long: export WEIGHTSYNC_TEST_TIER = long
test-long: setup
	@$(BIN)/pytest -o timeout=3600 -o faulthandler_timeout=7200

test-vllm: setup
	@# A process for each file: an engine and simulated ranks both own the process group of theirs.
	@set -e; for file in tests/vllm/test_*.py; do \
	    scripts/stack vllm -- python -m pytest -c tests/vllm/pytest.ini "$$file"; \
	done

test-trl: setup
	@scripts/stack trl -- python -m pytest -c tests/trl/pytest.ini tests/trl

test-engines: setup
	@# Each folder runs in the stack of its name, each file in a process of its own.
	@set -e; for file in tests/engines/*/test_*.py; do \
	    stack=$$(basename "$$(dirname "$$file")"); \
	    scripts/stack "$$stack" -- python -m pytest -c "$$(dirname "$$file")/pytest.ini" "$$file"; \
	done

bench: setup
	@$(BIN)/weightsync bench transfer --json

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -f .venv/.weightsync/native
