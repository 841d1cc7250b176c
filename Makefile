# One command each: set-up is made on first use, in .venv. `make demo` and `make test` work on a fresh machine.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
TORCH  := $(shell sed -n 's/.*"\(torch==[0-9.]*\)".*/\1/p' pyproject.toml)

.PHONY: demo demo-short test test-slow mutation mutation-sample bench lint format clean

# torch first and pinned, so that nothing that follows resolves another one.
$(VENV)/installed: pyproject.toml setup.py $(wildcard csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$(TORCH)" ninja numpy "setuptools>=77"
	$(BIN)/pip install -q --no-build-isolation -e ".[test,demo]"
	touch $@

demo: $(VENV)/installed
	$(BIN)/python -m examples.demo --out out/demo

demo-short: $(VENV)/installed
	$(BIN)/python -m examples.demo --short --out out/demo-short

test: $(VENV)/installed
	$(BIN)/python -m pytest -m "not slow" tests

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow tests

# Builds the extension with seeded faults and shows that the tests notice each: all of them, or the first four that
# any optimizer test must notice.
mutation: $(VENV)/installed
	$(BIN)/python -m tests.mutation

mutation-sample: $(VENV)/installed
	$(BIN)/python -m tests.mutation --only "does nothing" --only "last of several" --only "lags a step" \
		--only "decay is forgotten"

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.step_time
	$(BIN)/python -m benchmarks.accuracy

$(VENV)/linters: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $$(sed -n 's/^lint = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",')
	touch $@

lint: $(VENV)/installed $(VENV)/linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*')
	$(BIN)/mypy

format: $(VENV)/linters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*')

clean:
	rm -rf $(VENV) build out adamw_ext/*.so *.egg-info
