# make demo: fine-tune a real pretrained network in Tune mode.   make test: lint, types, tests.
# Each makes its own virtual environment, with the versions of constraints.txt.

PYTHON ?= python3

.PHONY: demo test clean

demo: .venv-demo/installed
	.venv-demo/bin/python examples/finetune.py --out examples/out

test: .venv-test/installed
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/mypy
	.venv-test/bin/pytest

.venv-demo/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	touch $@

.venv-test/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-test
	.venv-test/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,test]'
	touch $@

clean:
	rm -rf .venv-demo .venv-test examples/out
