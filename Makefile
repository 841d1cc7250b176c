# One command each: set-up is made on first use, in .venv. `make demo` and `make test` work on a fresh machine.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
TORCH  := $(shell sed -n 's/.*"\(torch==[0-9.]*\)".*/\1/p' pyproject.toml)

.PHONY: demo demo-short demo-cluster test test-slow test-properties test-trainers test-packaging test-sanitized \
	test-sanitized-address test-sanitized-thread test-cuda-build gpu-check fuzz mutation mutation-sample \
	mutation-sanitized bench bench-all bench-modes bench-sharded long-run limits lint format clean

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

# Two sharded processes, one of them killed; restarted on two, one and four.
demo-cluster: $(VENV)/installed
	$(BIN)/python -m examples.cluster --out out/demo-cluster

# In as many processes as there are cores, up to four.
PYTEST := -m pytest -n auto --maxprocesses 4 --durations 25 -m "not slow" tests

test: $(VENV)/installed
	$(BIN)/python $(PYTEST)

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow tests

# Other random scenarios than the suite's; seed and counts go into benchmarks/results.
test-properties: $(VENV)/installed
	$(BIN)/python -m tests.long_properties --examples 1000 --out benchmarks/results

# Other libraries' training loops with our optimizer in them, in an environment of their own over the project's, which
# stays as it is: they bring a plugin for pytest and a torchvision that a CPU build of torch cannot import, and with them
# a TorchScript test of the suite failed in a whole run. DeepSpeed calls ninja by name.
TRAINERS      := tests/trainers/requirements.txt
TRAINERS_VENV := .venv-trainers
SITE_PACKAGES := -c "import sysconfig; print(sysconfig.get_path('purelib'))"

$(TRAINERS_VENV)/installed: $(VENV)/installed $(TRAINERS)
	test -x $(TRAINERS_VENV)/bin/python || $(PYTHON) -m venv $(TRAINERS_VENV)
	echo "import site; site.addsitedir('$$($(BIN)/python $(SITE_PACKAGES))')" \
		> "$$($(TRAINERS_VENV)/bin/python $(SITE_PACKAGES))/project.pth"
	$(TRAINERS_VENV)/bin/pip install -q "$(TORCH)" -r $(TRAINERS)
	touch $@

test-trainers: $(TRAINERS_VENV)/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(TRAINERS_VENV)/bin/python -m pytest -n auto --maxprocesses 2 --dist loadfile \
		-m trainers tests/trainers

# The CUDA kernels without a GPU: built against a CUDA build of torch (the second torch version that is tested) in a copy
# of the checkout, looked into, and the suite run on that build. A skip in the first part would hide a failure.
# Run before, or free of torch's version; and of the engines those that hold plain tensors, which take long.
SAME_EVERYWHERE := sanitized.py parity.py bench_modes.py kernels_cuda.py migration.py ddp.py zero.py in_backward.py \
	example_cluster.py long_run.py growth.py readme.py evidence.py install_failures.py properties.py limits.py fuzzing.py \
	exits.py forks.py interrupts.py
CUDA_TORCH := torch==2.11.0
CUDA_VENV  := .venv-cuda
CUDA_COPY  := out/cuda-build

$(CUDA_VENV)/installed: Makefile
	test -x $(CUDA_VENV)/bin/python || $(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/pip install -q "$(CUDA_TORCH)" ninja numpy "setuptools>=77" "pytest>=8" "pytest-xdist>=3.5" \
		"hypothesis>=6.100" "tqdm>=4.60" "nvidia-cuda-cuobjdump>=13,<14" "nvidia-cuda-nvdisasm>=13,<14"
	touch $@

test-cuda-build: $(CUDA_VENV)/installed
	mkdir -p $(CUDA_COPY)
	git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents --preserve=timestamps -t $(CUDA_COPY)
	cd $(CUDA_COPY) && ADAMW_EXT_CUDA=1 TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0+PTX" \
		$(CURDIR)/$(CUDA_VENV)/bin/python setup.py -q build_ext --inplace egg_info > build.log 2>&1 || (cat build.log; false)
	cd $(CUDA_COPY) && $(CURDIR)/$(CUDA_VENV)/bin/python -m adamw_ext
	cd $(CUDA_COPY) && $(CURDIR)/$(CUDA_VENV)/bin/python -m pytest -v -rs tests/test_kernels_cuda.py > kernels.log; \
		status=$$?; cat kernels.log; test $$status = 0 && ! grep -q SKIPPED kernels.log
	cd $(CUDA_COPY) && $(CURDIR)/$(CUDA_VENV)/bin/python $(PYTEST) $(addprefix --ignore tests/test_,$(SAME_EVERYWHERE))

# Wheels and the source archive: built, looked into, installed elsewhere and tested there, with each of the PYTHONS, or
# the environments whose Pythons are BASES. Wheels are kept in out/packaging: remove it after a change.
PYTHONS  ?= $(PYTHON)
RECORD   ?= out/packaging
BASES_OF := .venv-packaging

$(BASES_OF)/%/installed: pyproject.toml
	test -x $(@D)/bin/python || $* -m venv $(@D)
	$(@D)/bin/pip install -q "$(TORCH)" ninja numpy "setuptools>=77" build "pytest>=8" "hypothesis>=6.100" "tqdm>=4.60"
	touch $@

test-packaging: $(VENV)/installed $(if $(BASES),,$(PYTHONS:%=$(BASES_OF)/%/installed))
	$(BIN)/python -m pytest -v -m packaging tests/packaging --record $(RECORD) \
		$(addprefix --base ,$(or $(BASES),$(PYTHONS:%=$(BASES_OF)/%/bin/python)))

# The extension built with AddressSanitizer and UndefinedBehaviorSanitizer, and with ThreadSanitizer, each in a copy of
# the checkout, and the tests of its kernels and threads on those builds: both at once, each with half of the cores.
test-sanitized: $(VENV)/installed
	+MAX_JOBS=$${MAX_JOBS:-$$(($$(nproc) / 2 + $$(nproc) % 2))} $(MAKE) -j 2 test-sanitized-address test-sanitized-thread

test-sanitized-address test-sanitized-thread: test-sanitized-%: $(VENV)/installed
	$(BIN)/python -m tests.sanitizers $*

# On demand: the same, and seeded faults that the sanitizers must report.
mutation-sanitized: $(VENV)/installed
	$(BIN)/python -m tests.sanitized_mutation

# Bad input at random for ten minutes, at every entrance; counts and findings go into benchmarks/results.
fuzz: $(VENV)/installed
	$(BIN)/python -m tests.fuzzing --seconds 600 --out benchmarks/results

# On a machine with an NVIDIA GPU, with $(PYTHON)'s own torch and pytest and a CUDA toolkit: nothing is installed.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check

# Seeds faults, builds where they are compiled, and shows that the tests notice each: all of them, or a few in every
# layer that any optimizer test must notice.
mutation: $(VENV)/installed
	$(BIN)/python -m tests.mutation --out benchmarks/results

mutation-sample: $(VENV)/installed
	$(BIN)/python -m tests.mutation --only "the kernel does nothing" --only "last of several" \
		--only "the bias correction lags a step" --only "counts begin at 1" --only "found_inf does not reach" \
		--only "first step made is kept"

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.step_time
	$(BIN)/python -m benchmarks.accuracy
	$(BIN)/python -m benchmarks.growth
	$(BIN)/python -m benchmarks.readme

bench-all: bench bench-modes bench-sharded

# 10,000 steps against float64: errors, memory, resumes at random steps.
long-run: $(VENV)/installed
	$(BIN)/python -m benchmarks.long_run
	$(BIN)/python -m benchmarks.readme

# Two thousand million elements, 100,000 tensors, 10,000 groups, a million steps: 18 GB of memory.
limits: $(VENV)/installed
	$(BIN)/python -m benchmarks.limits --elements 2147483649

# What each precision mode costs in bytes, time and final loss.
bench-modes: $(VENV)/installed
	$(BIN)/python -m benchmarks.parity
	$(BIN)/python -m benchmarks.modes

# What DTensors cost, and what stepping in backward saves.
bench-sharded: $(VENV)/installed
	$(BIN)/python -m benchmarks.sharded
	$(BIN)/python -m benchmarks.in_backward

$(VENV)/linters: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $$(sed -n 's/^lint = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",')
	touch $@

lint: $(VENV)/installed $(VENV)/linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*' 'adamw_ext/include/*' 'tests/sanitized/*.cpp' 'tests/sanitized/*.h' 'tests/libtorch/*')
	$(BIN)/mypy

format: $(VENV)/linters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*' 'adamw_ext/include/*' 'tests/sanitized/*.cpp' 'tests/sanitized/*.h' 'tests/libtorch/*')

clean:
	rm -rf $(VENV) $(TRAINERS_VENV) $(BASES_OF) build out adamw_ext/*.so *.egg-info
