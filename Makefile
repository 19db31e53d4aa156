# Everything a newcomer needs is `make compare` and `make test`; each sets up what it needs, once.
PY ?= python3
V := .venv/bin/python
LINUX_NOTE := (on a machine with an NVIDIA GPU, PyTorch brings CUDA along: some 4 GB more)

# What numba, PyTorch, MKL and oneDNN may use of the processor.
AVX2 := NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=+avx2,+fma \
	ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2

.PHONY: help compare test quick fuzz test-avx2 bench-cpu gpu aot lint smoke clean
help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

compare: .venv/.run  ## train five architectures at one budget, measure them against context length, write the report
	@.venv/bin/crossover compare $(COMPARE)

test: .venv/.dev  ## run the whole test suite, on every core
	@OMP_NUM_THREADS=1 $(V) -m pytest -q -n auto --dist worksteal $(PYTEST)

quick: test  ## one cheap test of everything, for daily work: under a minute on two cores
quick: override PYTEST += -m quick

fuzz: .venv/.dev  ## 10,000 broken files for every reader, 10,000 sizes for the operations, a kill wherever a comparison writes: hours
	@FUZZ=100 $(MAKE) --no-print-directory test PYTEST="-m fuzz $(PYTEST)"

test-avx2: .venv/.dev  ## the same as on a processor without AVX-512, whose vectors are half as wide
	@$(AVX2) $(V) tests/processor.py avx2
	@$(AVX2) $(MAKE) --no-print-directory test

bench-cpu: .venv/.dev  ## race operations, training and decoding against peers and limits on this CPU: a quarter of an hour
	@.venv/bin/crossover bench kernels $(BENCH)

gpu:  ## check every kernel on an NVIDIA GPU and time it against floor and peers: nine minutes, nothing to install
	@mkdir -p .ide && ln -sfn .. .ide/crossover && PYTHONPATH=.ide$${PYTHONPATH:+:$$PYTHONPATH} $(PY) -m crossover.benchmarks.gpu $(GPU)

aot: .venv/.dev  ## compile the Triton kernels for sm_80 and sm_90 with the oldest Triton they run on, and print their cost
	@$(PY) -m pip --python $(V) install -q --disable-pip-version-check --no-deps --target .venv/triton-3.6 triton==3.6.0
	@PYTHONPATH=.venv/triton-3.6 $(V) tests/kernels/aot.py

lint: .venv/.dev  ## style and types
	@$(V) -m ruff check . && $(V) -m ruff format --check . && $(V) -m basedpyright

smoke:  ## a shortened `make compare` from scratch, for checks: one minute or two instead of eight
	@rm -rf runs/smoke
	@$(MAKE) --no-print-directory compare COMPARE="--seeds 1 --steps 30 --context 128 512 --out runs/smoke"

clean:  ## remove the environment; runs/ stays
	rm -rf .venv .ide build *.egg-info

# The link lets the type checker, which reads files and not installs, resolve `crossover.*`.
.venv/pyvenv.cfg:
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "crossover needs Python 3.11 or newer: make PY=python3.12 ...")'
	@$(PY) -m venv --without-pip --clear .venv
	@mkdir -p .ide && ln -sfn .. .ide/crossover

.venv/.run: .venv/pyvenv.cfg setup.py constraints.txt
	@echo "Setting up .venv, once: about 0.5 GB to download, 1.6 GB on disk, 1 to 3 minutes $(LINUX_NOTE)"
	@$(PY) -m pip --python $(V) install -q --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/.dev: .venv/.run
	@echo "Adding what tests and checks need, once: about 0.3 GB to download, 1.2 GB on disk, under a minute"
	@$(PY) -m pip --python $(V) install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
