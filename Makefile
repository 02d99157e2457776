# `make demo` and `make test` are the two commands; `make help` lists the others.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup build demo run install test unit integration clients arm lint screenshots fixtures fidelity jpegs evaluate agreement stages peers versions int8 through-redis label-speed label-many cascade-speed baseline compare bench \
        serving load neighbour redis-suite chaos fuzz memcheck asan soak train cuda gpu-proof clean

CARGO  ?= cargo
SUDO   := $(if $(filter 0,$(shell id -u)),,sudo)
RELEASE := target/release
# Of the whole workspace: for another choice of packages cargo may build the engine once more.
EVERYTHING := build --release --locked --workspace --lib --bins --tests
# The tests on real servers, which a plain `cargo test` leaves out.
SERVERS := test --release --locked --workspace --test tests --
WORK   ?= /tmp/florence-work
PREFIX ?= /usr/local
SYSCONFDIR ?= /etc
# Used by the developers' targets only: a Python with tools/requirements.txt.
REFERENCE_PYTHON ?= .venv-reference/bin/python

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup:  ## install what the build and the demo need (Debian)
	@tools/setup.sh base

build: setup  ## build the module and the command line
	$(CARGO) build --release --locked -p florence-module -p florence-cli

demo: build  ## start redis-server with the module and ask it about the sample pictures
	@tools/demo.sh

run: build  ## redis-server with redis.conf, in the foreground; ARGS="--port 6380" adds settings
	@tools/run.sh $(ARGS)

install:  ## module, command line and systemd unit to PREFIX (/usr/local), after `make build`; as root
	@tools/install.sh "$(PREFIX)" "$(SYSCONFDIR)" "$(DESTDIR)"

test: setup  ## everything: unit tests, goldens, docs, real servers, lints
	@tools/setup.sh tests
	$(MAKE) --no-print-directory lint unit integration

unit:  ## unit tests, goldens of the reference, documentation tests, the command line and its page
	$(CARGO) $(EVERYTHING)
	$(CARGO) test --release --locked --workspace
	@[ -n "$$FLORENCE_TOKENIZER_DIR" ] || echo 'NOT RUN: the real tokenizer (FLORENCE_TOKENIZER_DIR is not set)'

integration:  ## the integration tests, the typed clients' and the documents' on every server of tools/setup.sh
	$(CARGO) $(EVERYTHING)
	@! readelf -d $(RELEASE)/libflorence.so | grep -E 'libcu(da|dart|blas|rand)' \
	  || { echo "a build for the CPU must need no CUDA library"; exit 1; }
	@tools/integration.sh

clients: build  ## build and test the typed clients on FLORENCE_SERVER (default: redis-server)
	@tools/setup.sh tests
	@tools/clients.sh

cuda: setup  ## build for CUDA devices, into target/cuda; the tool kit comes from PyPI where there is none
	@tools/setup.sh cuda
	@tools/cuda.py build

gpu-proof: cuda  ## pack target/gpu-proof, whose proof.py shows on a machine with a GPU what runs there
	@tools/gpu_proof.py

arm: setup  ## the engine's unit tests and goldens on 64-bit Arm, emulated
	@tools/setup.sh arm
	@tools/arm.sh --lib --test golden_parts --test golden_random --test golden_pictures -- --skip a_device

lint:  ## formatting, clippy, documentation, layers
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --release --locked -- -D warnings
	$(CARGO) clippy --workspace --test tests --release --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" $(CARGO) doc --release --locked --no-deps --document-private-items --workspace
	@! $(CARGO) tree --locked -p florence-engine -i redis-module >/dev/null 2>&1 || { echo "the engine must not know Redis"; exit 1; }

screenshots: setup  ## pictures of the page of `florence web`, some of them into docs
	@tools/setup.sh tests
	$(CARGO) build --release --locked -p florence-module
	mkdir -p target/screenshots
	FLORENCE_SCREENSHOTS=$(CURDIR)/target/screenshots $(CARGO) test --release --locked -p florence-cli --test browser pictures_of_the_page
	for part in overview jobs job; do cp target/screenshots/$$part-light.png docs/web-$$part.png; done

.venv-reference:
	@tools/setup.sh reference
	python3 -m venv $@
	$@/bin/pip install -q -r tools/requirements.txt

fixtures: .venv-reference  ## rebuild the golden fixtures with the reference (several GB of Python)
	cd tools && for kind in random tiny chains nbest; do ../$(REFERENCE_PYTHON) make_fixtures.py $$kind || exit 1; done
	cd tools && for kind in adapters finetunes; do ../$(REFERENCE_PYTHON) make_$$kind.py || exit 1; done
	$(REFERENCE_PYTHON) tools/pictures.py

fidelity: .venv-reference build  ## compare with the reference on random checkpoints of base and large shape
	cd tools && for shape in base large; do \
	  ../$(REFERENCE_PYTHON) fidelity.py $$shape --florence ../$(RELEASE)/florence --work $(WORK) || exit 1; done

.venv-pictures:
	@tools/setup.sh reference
	python3 -m venv $@
	$@/bin/pip install -q -r tools/requirements-pictures.txt

jpegs: .venv-pictures build  ## ask about 120 JPEG files and about Pillow's pixels of them: equal tokens
	cd tools && ../.venv-pictures/bin/python jpeg_ids.py --florence ../$(RELEASE)/florence --work $(WORK)/jpegs

evaluate: .venv-reference build  ## score models/tiny on 500 held-out pictures, into its model card
	cd tools && ../$(REFERENCE_PYTHON) evaluate.py --florence ../$(RELEASE)/florence --work $(WORK)

agreement: .venv-reference build  ## compare precision auto with float32 on 500 pictures, into docs/SPEED.md
	cd tools && ../$(REFERENCE_PYTHON) evaluate.py --against int16 --florence ../$(RELEASE)/florence --work $(WORK)

stages: .venv-reference build  ## time base shape beside PyTorch, stage by stage
	cd tools && ../$(REFERENCE_PYTHON) stages.py base --florence ../$(RELEASE)/florence --work $(WORK)

.venv-peers:
	@tools/setup.sh reference
	python3 -m venv $@
	$@/bin/pip install -q -r tools/requirements-peers.txt

peers: .venv-peers build  ## time base shape beside OpenVINO, ONNX Runtime and PyTorch
	cd tools && ../.venv-peers/bin/python peers.py --florence ../$(RELEASE)/florence --work $(WORK)

versions:  ## time the CPU kernels of the commit BEFORE beside those of the working tree
	python3 tools/versions.py $(BEFORE) --work $(WORK)

int8: .venv-peers build  ## what int8 costs in answers, beside OpenVINO's and ONNX Runtime's
	cd tools && ../.venv-peers/bin/python int8.py --florence ../$(RELEASE)/florence --work $(WORK)

through-redis: .venv-reference build  ## what a job takes through Redis beside `florence bench`
	cd tools && ../$(REFERENCE_PYTHON) through_redis.py base --work $(WORK)

label-speed: .venv-reference build  ## pictures a second of `florence label` beside a loop around transformers
	cd tools && speed() { ../$(REFERENCE_PYTHON) label_speed.py "$$@" --florence ../$(RELEASE)/florence --work $(WORK); } \
	  && speed ../models/tiny --pictures 1000 --rounds 1 && speed base --pictures 16 --batches 1 4 --rounds 1

cascade-speed: .venv-reference build  ## a cascade as one job, as single jobs, and through transformers
	$(REFERENCE_PYTHON) tools/cascade_speed.py models/tiny --module $(RELEASE)/libflorence.so

label-many:  ## label 100,000 small pictures in a run that is killed again and again
	FLORENCE_LABEL_PICTURES=100000 $(CARGO) test --release --locked -p florence-cli --test label -- --nocapture killed_again

.venv-baseline:
	@tools/setup.sh reference
	python3 -m venv $@
	$@/bin/pip install -q -r loadtests/baseline/requirements.txt

baseline: .venv-baseline build  ## the scenarios of loadtests/scenarios through Celery and PyTorch; CHECKPOINT=directory
	$(CARGO) build --release --locked -p florence-load
	@tools/load.sh baseline

compare: .venv-baseline build  ## Celery and PyTorch beside Redis with the module, on models/tiny and base shape
	$(CARGO) build --release --locked -p florence-load
	.venv-baseline/bin/python loadtests/baseline/compare.py models/tiny
	.venv-baseline/bin/python loadtests/baseline/compare.py base --tokens 32 --seconds 40 --work $(WORK)

bench: build  ## every kernel on its own, beside the peak of a core, and every command
	$(CARGO) bench --locked -p florence-engine --features bench
	$(CARGO) bench --locked -p florence-load

serving: build  ## throughput, reaction and a long queue through a server of its own
	$(CARGO) build --release --locked -p florence-load
	@tools/serving.sh

load: build  ## the scenarios of loadtests/scenarios; tables, and target/load.html with plots
	$(CARGO) build --release --locked -p florence-load
	@tools/load.sh

neighbour: build  ## what the module costs the other users of a server, beside one without it
	@tools/setup.sh tests
	.venv/bin/python tools/neighbour.py

SUITE ?= full

redis-suite: build  ## Redis' own tests without and with the module; SUITE=short for what CI runs
	@tools/setup.sh suite
	@tools/redis_suite.sh $(SUITE)

chaos: build  ## 10,000 jobs on servers that are killed every few seconds, then mixed faults; prints what became of them
	FLORENCE_CHAOS_JOBS=10200 $(CARGO) $(SERVERS) --nocapture --test-threads=1 chaos

fuzz: build  ## a million random commands, 20,000 mutated jobs and pictures each, against live servers
	FLORENCE_FUZZ=50 $(CARGO) $(SERVERS) --nocapture --test-threads=1 fuzz::random
	FLORENCE_FUZZ=50 $(CARGO) $(SERVERS) --nocapture --test-threads=1 fuzz::mutated_jobs
	FLORENCE_FUZZ=100 $(CARGO) $(SERVERS) --nocapture --test-threads=1 fuzz::mutated_pictures

memcheck: build  ## jobs on a server under valgrind
	@command -v valgrind >/dev/null || $(SUDO) apt-get install -qq -y valgrind >/dev/null
	tools/memcheck.sh

ASAN ?= -p florence-engine -p florence-cuda

asan: setup  ## the engine's and the CUDA kernels' tests under AddressSanitizer, all instruction sets of this CPU
	RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address $(CARGO) test --release --locked --target-dir target/asan \
	  --target $(shell rustc -vV | sed -n 's/^host: //p') $(ASAN) --lib --tests

soak: build  ## an hour at full load; memory, threads and descriptors must stay as they were
	FLORENCE_SOAK_SECONDS=3600 $(CARGO) $(SERVERS) --nocapture soak

train: .venv-reference  ## train models/tiny (hours; resumes from $(WORK)/train)
	cd tools && ../$(REFERENCE_PYTHON) train_tiny.py --run $(WORK)/train --steps 8000

clean:  ## remove what was built and installed here
	rm -rf target .venv .venv-celery-5.0 .venv-clients .venv-formats .venv-reference .venv-peers .venv-baseline .servers .arm tests/clients/node_modules clients/node/node_modules clients/node/types clients/node/dist clients/python/dist demo-out
