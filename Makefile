# Two commands do everything: make train, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PARALLEL ?= 2

.PHONY: install train demo test test-all smoke lint bench ablation together joint-step human whole-way gpu-check gpu-bundle format clean

$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e '.[dev,towers]'
	touch $@

install: $(VENV)/installed

train: install
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed platform/launch.py --task retrieval

# A page to search the sample's test clips in, with a model of all tasks (trained first, some 12 minutes): make demo
DEMO := $(if $(wildcard runs/demo/checkpoints/step-*/manifest.json),--resume runs/demo,--task all name=demo)
demo: install
	test -f runs/demo/scores-test.json || PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed platform/launch.py $(DEMO)
	$(BIN)/emcl unpack shards/sample/test-000000.tar --out demo/videos
	$(BIN)/emcl index demo/videos --model runs/demo --out demo/index
	$(BIN)/emcl serve demo/index --model runs/demo --open $(ARGS)

# One thread a process: several would wait for each other's cores
TEST := OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n $(PARALLEL) --dist loadgroup

test: install
	$(TEST) -m "not nightly"

# And the sample recipe trained to its end, a quarter of an hour more: what `make train` shows as well
test-all: install
	$(TEST)

# Every benchmark beside its baseline, some 10 minutes: make bench, make bench ARGS='--only loading step'
bench: $(VENV)/bench
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python benchmarks/bench.py $(ARGS)

$(VENV)/bench: $(VENV)/installed
	$(BIN)/pip install --quiet -e '.[bench]'
	touch $@

# MSR-VTT's shards are made where they are missing: make ablation MSRVTT=ANNOTATIONS_DIR FRAMES=VIDEOS_TAR
ablation: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python benchmarks/ablation.py $(if $(MSRVTT),--msrvtt $(MSRVTT)) \
		$(if $(FRAMES),--frames $(FRAMES)) $(ARGS)

# One joint model beside three single ones, 3 seeds: make together RECIPE=msrvtt_frames_all
together: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python benchmarks/together.py $(if $(RECIPE),--recipe $(RECIPE)) $(ARGS)

joint-step: install
	$(BIN)/python benchmarks/joint_step.py

# MSR-VTT's own first sentences scored against the others: make human MSRVTT=ANNOTATIONS_DIR
human: install
	$(BIN)/python benchmarks/human_captions.py $(MSRVTT)

# From published files to a report: make whole-way MSRVTT=ANNOTATIONS_DIR FRAMES=VIDEOS_TAR
whole-way: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python benchmarks/whole_way.py msrvtt --annotations $(MSRVTT) --videos $(FRAMES)

# What this machine makes of the platform, within 6 minutes and without internet: make gpu-check ARGS='--only speed'
gpu-check: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/emcl doctor $(ARGS)

# What that needs on a machine without internet, as one tar: make gpu-bundle ARGS='--python 3.11'
gpu-bundle: install
	$(BIN)/emcl bundle $(ARGS)

# A short look at another Python, such as `make smoke PYTHON=python3.13 VENV=.venv-3.13`: EM, frames, all tasks trained a few steps
# on one rank and on three, scored, and served
SMOKE := tests/test_em.py tests/test_loader.py tests/test_together.py tests/test_serve.py
smoke: install
	$(TEST) -m "not nightly" $(SMOKE)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy platform/launch.py platform/emcl tasks benchmarks

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info platform/*.egg-info
