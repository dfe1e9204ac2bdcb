# Everything runs in .venv, with the versions of constraints.txt.

# The first of these that is Python 3.12 or newer.
CANDIDATES := $(PYTHON) python3.12 python3.13 python3.14 python3 $(wildcard $(HOME)/.pyenv/versions/3.1[2-9]*/bin/python)
FIND_PYTHON = for p in $(CANDIDATES); do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && { echo "$$p"; exit 0; }; done; \
	echo "error: no Python 3.12 or newer found; install one, or run: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1

SITE_PACKAGES = import sysconfig; print(sysconfig.get_path("purelib"))

BIN := .venv/bin
RUN := JAX_PLATFORMS=$(or $(JAX_PLATFORMS),cpu) $(BIN)/python

# What the parity tests run on, beside the newest release, which constraints.txt has.
OLDEST_TRANSFORMERS := 5.21.0

.PHONY: demo test test-parity test-servers test-real test-browser test-notebooks test-interruptions fuzz check-hardware compiled-memory benchmarks lint types check study tiny-lrm clean

demo: .venv/installed  ## The whole method on the embedded model: score, refine, fine-tune, evaluate, report.
	$(RUN) scripts/study.py --config=configs/tiny.py --output=runs/demo

# Most of the suite's time is compilation: code that runs once need not be optimised. The parity tests (on the newest
# transformers), the benchmarks and the studies run optimised code.
QUICK := XLA_FLAGS="$(XLA_FLAGS) --xla_backend_optimization_level=0"

test: .venv/installed  ## The test suite.
	$(QUICK) $(BIN)/python -m pytest

test-parity: .venv/parity .venv/oldest/installed  ## Agreement with the newest and the oldest transformers, on PyTorch.
	$(BIN)/python -m pytest -m parity tests/parity
	$(QUICK) TRANSFORMERS=$(OLDEST_TRANSFORMERS) .venv/oldest/bin/python -m pytest -m parity tests/parity

test-servers: .venv/servers/installed  ## Through real servers, transformers' and llama.cpp's, and a local bucket, on the embedded model.
	.venv/servers/bin/python -m pytest -m servers tests/servers

test-real: .venv/servers/installed runs/real/smollm2.gguf  ## The commands on a pretrained model, beside transformers on PyTorch.
	REAL_MODEL=$(abspath runs/real/smollm2.gguf) .venv/servers/bin/python -m pytest -m real tests/real

test-browser: .venv/browser/installed  ## Reports in a real browser; needs Chromium ($$CHROMIUM, or on the path).
	.venv/browser/bin/python -m pytest -n 1 -m browser tests/browser

test-notebooks: .venv/notebooks/installed  ## The notebooks, executed whole with the embedded model in Qwen3's place.
	.venv/notebooks/bin/python -m pytest -m '$(or $(NOTEBOOKS),notebooks)' tests/notebooks

test-interruptions: .venv/installed  ## Signals, kills, full disks and other troubles, command by command; KILLS=1000 for all.
	KILLS=$(KILLS) COMMANDS="$(COMMANDS)" $(BIN)/python -m pytest -m '$(or $(INTERRUPTIONS),interruptions)' tests/interruptions

fuzz: .venv/installed  ## Damaged inputs of every kind; FUZZ=1000 for a tenth of them.
	FUZZ=$(or $(FUZZ),10080) $(BIN)/python -m pytest -m fuzz tests/fuzz

check-hardware: .venv/hardware/installed  ## What users run, and the kernels, compile and fit TPUs and H100s, on any machine.
	.venv/hardware/bin/python -m pytest -m '$(or $(HARDWARE),hardware)' tests/hardware

compiled-memory: .venv/hardware/installed  ## The kernels' temporary memory on those devices, by their compilers.
	JAX_PLATFORMS=cpu .venv/hardware/bin/python benchmarks/compiled_memory.py

benchmarks: .venv/parity  ## Everything beside its rivals; small on a CPU, an hour.
	$(RUN) benchmarks/attention.py
	$(RUN) benchmarks/token_scores.py
	$(RUN) benchmarks/scoring.py
	$(RUN) benchmarks/generation.py
	$(RUN) benchmarks/training.py
	$(RUN) benchmarks/training.py --model=103m --cases=STAR-1 --count=4
	$(RUN) benchmarks/seats.py
	$(RUN) benchmarks/activations.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/pyright

check: lint types test  ## What to run before a commit.

study: .venv/installed runs/tiny_lrm_seed1/model  ## The full study on the embedded model (hours).
	$(RUN) scripts/study.py --config=configs/tiny_full.py --output=runs/tiny_full

tiny-lrm: .venv/installed  ## Builds the embedded model from nothing (over an hour on 2 cores).
	$(RUN) scripts/build_tiny_lrm.py --output=runs/tiny_lrm

runs/tiny_lrm_seed1/model: | .venv/installed
	$(RUN) scripts/build_tiny_lrm.py --seed=1 --output=runs/tiny_lrm_seed1

runs/real/smollm2.gguf: | .venv/installed
	$(BIN)/python tests/real/fetch.py runs/real

.venv/bin/python:
	@python=$$($(FIND_PYTHON)) && echo "using $$python" && "$$python" -m venv .venv

.venv/installed: .venv/bin/python setup.py constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,eval,harness,tensorboard]'
	@touch $@

.venv/parity: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[parity]'
	@touch $@

# Environments on top of .venv, which has what they do not.
.venv/%/pyvenv.cfg: .venv/installed
	$(BIN)/python -m venv .venv/$*
	@below=$$($(BIN)/python -c '$(SITE_PACKAGES)') here=$$(.venv/$*/bin/python -c '$(SITE_PACKAGES)'); \
		echo "import site; site.addsitedir('$$below')" > "$$here/below.pth"

.venv/oldest/installed: .venv/parity .venv/oldest/pyvenv.cfg
	.venv/oldest/bin/python -m pip install --quiet --disable-pip-version-check transformers==$(OLDEST_TRANSFORMERS)
	@touch $@

.venv/servers/installed: .venv/parity .venv/servers/pyvenv.cfg
	.venv/servers/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		'transformers[serving]' xllamacpp gguf gcsfs gcp-storage-emulator
	@touch $@

.venv/notebooks/installed: .venv/parity .venv/notebooks/pyvenv.cfg
	.venv/notebooks/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		nbclient ipykernel
	@touch $@

# Chromium itself comes from the system.
.venv/browser/installed: .venv/installed .venv/browser/pyvenv.cfg
	.venv/browser/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt playwright
	@touch $@

# In .venv itself JAX would look for a TPU and a GPU whenever it starts.
.venv/hardware/installed: .venv/installed .venv/hardware/pyvenv.cfg
	.venv/hardware/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		'jax[cuda13]' libtpu
	@touch $@

clean:
	rm -rf .venv runs build *.egg-info
