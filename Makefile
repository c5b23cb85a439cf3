# Each target sets up .venv by itself when it is missing, stale, or was made for another folder.

PYTHON ?= python3
PROMPT = a red apple, flat fluent style
# One thread per process: two spin on each other as soon as anything else runs on the machine.
TEST_THREADS ?= 1

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# The caption reaches the command as data: taken unexpanded by make, passed through the environment to the shell.
override DALLE_PROMPT := $(value PROMPT)
export DALLE_PROMPT
unexport PROMPT

.PHONY: draw serve test check bench race clean FORCE

draw: $(STAMP)
	$(VENV)/bin/dalle generate --out out -- "$$DALLE_PROMPT"

serve: $(STAMP)
	$(VENV)/bin/dalle serve

test: $(STAMP)
	OMP_NUM_THREADS=$(TEST_THREADS) $(PY) -m pytest tests -q

check: $(STAMP)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(MAKE) test
	OMP_NUM_THREADS=$(TEST_THREADS) $(PY) -m pytest tests -q -m long

bench: $(STAMP)
	$(PY) benchmarks/decode.py
	$(PY) benchmarks/serve.py

# Other people's samplers, in an environment of their own: about 1.5 GB, and most of an hour.
race: $(STAMP)
	[ -e .venv-peers/bin/python ] || benchmarks/install_peers.sh
	$(PY) benchmarks/race.py

# The stamp holds the folder that the editable install points at.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
$(STAMP): FORCE
endif
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@printf '%s\n' '$(CURDIR)' > $(STAMP)

clean:
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find dalle tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
