# What is typed daily. `make ci` is what a fresh checkout must pass.
.PHONY: setup test lint format ci clean

setup:
	pip install -c constraints.txt -e ".[dev,train]"

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

ci:
	bash .ci/run

clean:
	rm -rf build dist .ci/venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache src/*.egg-info
