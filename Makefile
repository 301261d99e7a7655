# Every target works from a clean clone on a Debian machine with a Rust toolchain.
# `make demo` and `make test` want root: they build network namespaces of their own and touch no other.

TARGET := $(abspath $(or $(CARGO_TARGET_DIR),target))
BIN := $(TARGET)/debug
CORPUS ?= ../shared/corpus
export URSA_ENVOY := $(TARGET)/envoy/envoy
export URSA_VM_DIR ?= $(TARGET)/vm
export CARGO_TERM_COLOR ?= never

.PHONY: help man packages build envoy vm-root lint deny unit e2e systemd conformance test demo soak bench fuzz clean

help:
	@echo 'make demo [KEEP=1]  the main job end to end on real parts, in namespaces of its own (root)'
	@echo 'make test           format, lints, dependencies, all tests, conformance where the corpus is (root)'
	@echo 'make soak           the redirect killed 1,000 times per backend and 1,000 random plans, then 50 rounds of kill -9'
	@echo '                    with traffic flowing, then 100,000 resources, 100 pods at once (root)'
	@echo 'make packages [PROFILE=dist]  .deb and .rpm of everything, into target/packages'
	@echo 'make man            manual pages and completion scripts of every program'
	@echo 'make bench          speed and size beside a bare server, release builds; rewrites docs/performance.md (root)'
	@echo 'make fuzz [SECONDS=30]  every fuzz target for that long; wants g++'
	@echo 'make build | envoy | vm-root | lint | deny | unit | e2e | systemd | conformance | clean'

build:
	cargo build --workspace --bins

# Manual pages and completion scripts, as a package installs them.
man: build
	@scripts/man.sh $(BIN) $(TARGET)/doc
	@echo 'manual pages and completion scripts are in $(TARGET)/doc'

# .deb and .rpm of everything. PROFILE=debug packs what the tests run; VERSION=… is for trying upgrades.
PROFILE ?= dist
PACKED := ursa-cli ursa-control ursa-agent ursa-init ursa-cni
packages: envoy
	@scripts/need-tools.sh packages
	cargo build $(if $(filter debug,$(PROFILE)),--workspace,--profile $(PROFILE) $(PACKED:%=--package %)) --bins
	@rm -rf $(TARGET)/packages/doc && scripts/man.sh $(TARGET)/$(PROFILE) $(TARGET)/packages/doc
	@packaging/build.py --bin $(TARGET)/$(PROFILE) --envoy $(URSA_ENVOY) --doc $(TARGET)/packages/doc --out $(TARGET)/packages \
	  $(if $(VERSION),--version $(VERSION)) $(if $(filter debug,$(PROFILE)),--fast)

envoy:
	@scripts/fetch-envoy.sh

vm-root:
	@scripts/make-vm-root.sh

lint:
	cargo fmt --all --check
	cargo clippy --quiet --workspace --all-targets -- -D warnings

deny:
	@scripts/fetch-cargo-deny.sh
	$(TARGET)/tools/bin/cargo-deny --log-level error check bans licenses sources

# Both select the whole workspace, or features would differ and everything compile twice.
unit: envoy build
	@scripts/need-tools.sh tests
	cargo test --workspace

# One after the other: they share two cores, and their deadlines are about the product.
e2e: envoy build
	@scripts/need-tools.sh tests
	cargo test --workspace --test e2e -- --test-threads 1

# The same on virtual machines with systemd.
systemd: envoy vm-root build
	@scripts/need-tools.sh tests
	cargo test --workspace --test systemd -- --test-threads 1

conformance: build
	@scripts/need-tools.sh tests
	@if [ -d '$(CORPUS)' ]; then $(BIN)/conformance '$(CORPUS)'; \
	else echo 'conformance: no corpus at $(CORPUS), skipped'; fi

test: lint deny unit e2e systemd conformance

demo: envoy
	@scripts/need-tools.sh
	@cargo build --quiet --workspace --bins
	@$(BIN)/demo --bin-dir $(BIN) --envoy $(URSA_ENVOY) $(if $(KEEP),--keep)

soak: envoy build
	@scripts/need-tools.sh tests
	URSA_KILLS=$(or $(KILLS),1000) URSA_INTENTS=$(or $(INTENTS),1000) URSA_REAPPLIES=300 \
	  cargo test --workspace --test backends -- --test-threads 2 --nocapture kill load packets
	$(BIN)/soak --rounds $(or $(ROUNDS),50) --resources $(or $(RESOURCES),100000) \
	  --pods $(or $(PODS),100) $(if $(SEED),--seed $(SEED))

# The machine's own numbers: nothing else should run meanwhile.
bench: envoy
	@scripts/need-tools.sh tests
	cargo build --release --workspace --bins
	$(TARGET)/release/bench --output docs/performance.md $(BENCH)

fuzz:
	@scripts/fuzz.sh $(or $(SECONDS),30)

clean:
	cargo clean
