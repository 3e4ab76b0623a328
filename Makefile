# One verb per need. Each sets up what it needs in .venv; Python 3.11 or later is all that must be there.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo serve check test crash replicas soak faults bench openapi hooks audit dist reference docs image lint screenshots lock clean
help: ## what there is
	@grep -hE '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 20

.venv/ready: requirements-dev.txt pyproject.toml client/pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed; name one with make PYTHON=...") if sys.version_info < (3, 11) else None'
	@echo 'Setting up .venv, once: some minutes and the network'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
	  -e client -e .
	@touch $@

.venv/shipping: .venv/ready requirements-shipping.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-shipping.txt
	@touch $@

demo: .venv/ready ## launch the example agent on a git slot, over HTTP, and watch it to its end
	$(BIN)/python examples/demo.py

serve: export RUNNER_LAUNCHER_STATE_DIR ?= $(CURDIR)/state/service
serve: export RUNNER_LAUNCHER_POOLS_FILE ?= $(CURDIR)/examples/pools.yaml
serve: export RUNNER_LAUNCHER_SLOT_ROOTS ?= $(CURDIR)/state/slots
serve: export RUNNER_LAUNCHER_RUNNER_COMMAND ?= '$(CURDIR)/$(BIN)/python' '$(CURDIR)/examples/agent.py'
serve: .venv/ready ## start the service with the example pools and the example agent
	@mkdir -p state/slots
	$(BIN)/runner-launcher serve

check: .venv/ready ## lint, format, types, architecture
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: .venv/ready ## all tests; what this machine lacks is skipped with a reason, unless REQUIRE_ENGINES names it
	$(BIN)/python -m pytest $(PYTEST_ARGS)

crash: .venv/ready ## kill the service ROUNDS times with launches in flight, and see that nothing is lost
	$(BIN)/python tests/crash/crash.py --rounds $(or $(ROUNDS),20) --kind $(or $(KIND),local-process) $(CRASH_ARGS)

replicas: .venv/ready ## kill, freeze and cut off two replicas in turn: DATABASE=postgresql://... of an empty database
	$(BIN)/python tests/crash/replicas.py --rounds $(or $(ROUNDS),20) --kind $(or $(KIND),docker) --database $(DATABASE) $(CRASH_ARGS)

soak: .venv/ready ## keep 200 runners alive for MINUTES while service and engine die now and then, and see that nothing grows
	$(BIN)/python tests/crash/soak.py --minutes $(or $(MINUTES),30) $(SOAK_ARGS)

faults: .venv/ready ## faults of engines, machine and database, also those that take minutes, and one table of them
	$(BIN)/python -m pytest -m "slow or fault" --timeout 900 $(PYTEST_ARGS)

bench: .venv/ready ## figures beside bare engines, of all that this machine has; BENCH_ARGS=--short only to see that they work
	$(BIN)/python tests/bench/bench.py $(BENCH_ARGS)

openapi: .venv/ready ## write openapi/ anew from the app
	$(BIN)/runner-launcher openapi > openapi/runner-launcher.yaml

lint: ## lint openapi/ by Redocly's rules; needs Node and the network
	npx --yes @redocly/cli@2 lint openapi/runner-launcher.yaml

screenshots: .venv/ready ## take the pictures of the status page in docs/screenshots anew, with a Chromium that is there
	$(BIN)/python tests/screenshots.py docs/screenshots

hooks: .venv/shipping ## have git run check before a commit, and audit before a push
	$(BIN)/pre-commit install --hook-type pre-commit --hook-type pre-push

audit: .venv/shipping ## known flaws in what we depend on, unsafe code and workflows, secrets that were left in files
	$(BIN)/pip-audit --disable-pip --require-hashes --requirement requirements.txt $(PIP_AUDIT_ARGS)
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive app client/runner_launcher_client examples
	$(BIN)/zizmor --quiet --offline .github/workflows
	git ls-files -z ':!tests/golden' ':!requirements*.txt' ':!openapi/versions.yaml' | xargs -0 $(BIN)/detect-secrets-hook \
	  --disable-plugin KeywordDetector --exclude-lines '@[a-z.]*example\.'

dist: .venv/shipping ## what a release has: both distributions, the chart, and the list of their parts (SBOM)
	rm -rf dist
	$(BIN)/python -m hatchling build --directory dist
	cd client && ../$(BIN)/python -m hatchling build --directory ../dist
	$(BIN)/python -c 'import helm_python; helm_python.package("deploy/helm/runner-launcher", destination="dist")'
	$(BIN)/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible --output-file dist/sbom.cdx.json requirements.txt

reference: .venv/ready ## write docs/pools.md anew from the models of pools
	$(BIN)/python docs/pool_reference.py

docs: .venv/shipping ## the documents as pages, in site/; a link that leads nowhere is a failure
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

image: ## build the service's image as runner-launcher:local; BASE_IMAGE names another base, BUILD_ARGS is for docker build
	docker build $(BUILD_ARGS) --build-arg BASE_IMAGE=$(or $(BASE_IMAGE),python:3.11-slim-bookworm) \
	  --build-arg VERSION=$$(sed -n 's/__version__ = "\(.*\)"/\1/p' app/__init__.py) \
	  --build-arg REVISION=$$(git rev-parse HEAD 2>/dev/null || echo unknown) --target runtime --tag runner-launcher:local .

lock: .venv/ready ## pin every dependency again, with hashes
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header \
	  --no-emit-package runner-launcher-client --all-extras pyproject.toml -o requirements.txt --upgrade
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header \
	  --no-emit-package runner-launcher-client --all-extras --group dev pyproject.toml -c requirements.txt -o requirements-dev.txt --upgrade
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header \
	  --no-emit-package runner-launcher-client --all-extras --group dev --group shipping pyproject.toml \
	  -c requirements-dev.txt -o requirements-shipping.txt --upgrade

clean: ## remove what make made, but for state/, where the records and slots of `make serve` are
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .grimp_cache site dist bench.json bench.md
