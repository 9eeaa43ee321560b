# Every target installs what it needs; `make` alone lists them.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install build demo demo-ceph bench test chaos soak fuzz check advisories fmt clean clean-demo

help: ## List what there is to make
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

install: ## Install the Debian packages that building and running need
	@dev/install.sh

build: ## Build the release binary
	@dev/install.sh
	cargo build --locked --release

demo: ## Back up and restore a 1 GiB volume through a broker of its own, and compare
	@dev/demo.sh

demo-ceph: ## The same with an RBD volume and a pool of backups, on a Ceph of its own
	@dev/demo-ceph.sh

bench: ## Measure the figures that the documentation gives; beside its peers too; needs 25 GB of disk and half an hour
	@dev/bench.sh

test: ## Run every test, with and without Ceph, on clusters of its own; ARGS='-E test(name)' picks some
	@dev/test.sh $(ARGS)

chaos: SEEDS ?= 20
chaos: ## Play SEEDS=20 rounds of random jobs while workers, the broker and stores die, from FIRST_SEED=… on
	@dev/install.sh test
	BACKHAUL_CHAOS_SEEDS=$(SEEDS) $(addprefix BACKHAUL_CHAOS_FIRST_SEED=,$(FIRST_SEED)) \
		cargo test --locked --test all chaos:: -- --nocapture

soak: JOBS ?= 100000
soak: ## Send JOBS=100000 tiny jobs through one worker, then through four: how many a second, and whether anything grows
	@dev/bench.sh jobs $(JOBS)

fuzz: SECONDS ?= 60
fuzz: ## Give each parser bytes by chance for SECONDS=60; TARGETS='command oslo' picks some
	@dev/fuzz.sh $(SECONDS) $(TARGETS)

check: ## Check format, lints, licences, scripts and container files
	@dev/install.sh check
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	cargo clippy --locked --all-targets --no-default-features -- -D warnings
	cargo deny --locked check --hide-inclusion-graph bans licenses sources
	shellcheck .ci/run dev/*.sh
	dev/containers.sh

advisories: ## Check the dependencies for known vulnerabilities; needs github.com
	@dev/install.sh check
	cargo deny --locked check advisories

fmt: ## Format the code
	cargo fmt

clean: ## Remove everything that was built
	cargo clean

clean-demo: ## Remove what the demos left to look at
	@dev/demo.sh clean
