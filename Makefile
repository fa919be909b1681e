# `make test` and `make demo` work on a fresh clone: they set up .venv first, once.
# An active virtual environment that already has torch (your CUDA build, say) is used instead of .venv.
VENV := $(shell ls -d "$$VIRTUAL_ENV"/lib/python3*/site-packages/torch >/dev/null 2>&1 \
          && echo "$$VIRTUAL_ENV" || echo .venv)
BIN := $(VENV)/bin
STAMP := $(VENV)/.rlhf-env-installed

export OMP_NUM_THREADS ?= 1

.PHONY: install demo test slow mutants check bench docs clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/setup.sh
	scripts/setup.sh $(VENV)
	touch $@

demo: $(STAMP)
	$(BIN)/rlhf-env demo --out runs/demo

test: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

slow: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

mutants: $(STAMP)
	$(BIN)/python -m tests.mutants

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

# The tables of the manual, under the commands that made them; `make bench PEERS=.bench` has TRL beside ours.
bench: SHELL := /bin/bash
bench: .SHELLFLAGS := -eo pipefail -c
bench: $(STAMP)
	$(BIN)/python benchmarks/iteration.py $(if $(PEERS),--peers $(PEERS)) | tee docs/benchmarks/iteration.md
	$(BIN)/python benchmarks/iteration.py --sizes 1M --rounds 11 | tee docs/benchmarks/near_the_floor.md
	$(BIN)/python benchmarks/iteration.py --sizes 1M --tokens 16 64 128 256 --rounds 2 | tee docs/benchmarks/tokens.md
	$(BIN)/python benchmarks/iteration.py --sizes 1M --batch 8 128 256 --rounds 2 | tee docs/benchmarks/responses.md
	$(BIN)/python benchmarks/below_the_floor.py | tee docs/benchmarks/below_the_floor.md
	$(BIN)/python benchmarks/decoding.py | tee docs/benchmarks/decoding.md
	$(BIN)/python benchmarks/reward.py | tee docs/benchmarks/reward.md
	$(BIN)/python benchmarks/sb3.py | tee docs/benchmarks/sb3.md
	$(BIN)/python benchmarks/environment.py

docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt sphinx furo
	$(BIN)/python -m sphinx -W -b html docs docs/_build

clean:
	rm -rf build dist *.egg-info docs/_build .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
