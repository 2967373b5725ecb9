# What is typed daily. `make ci` is what a fresh checkout must pass.
.PHONY: setup test lint format docs serve-docs ci clean

setup:
	pip install -c constraints.txt -e ".[dev]"

test:
	PYTHONPATH=src pytest -n auto

lint:
	ruff check .
	ruff format --check .
	mypy
	PYTHONPATH=src lint-imports

format:
	ruff check --fix .
	ruff format .

docs:
	PYTHONPATH=src NO_MKDOCS_2_WARNING=1 mkdocs build --strict

serve-docs:
	PYTHONPATH=src mkdocs serve

ci:
	bash .ci/run

clean:
	rm -rf build dist .ci/venv .ci/lowest-transformers .mypy_cache .pytest_cache .ruff_cache .import_linter_cache src/*.egg-info
