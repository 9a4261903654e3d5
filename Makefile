# make demo: fine-tune a real pretrained network in Tune mode.   make test: lint, types, tests.
# make fuzz: random networks against eager.   make zoo: real models of timm, torchvision, transformers against eager.
# make benchmarks: the tables and plots of docs/benchmarks, and README's table, from the JSON there.
# Each makes its own virtual environment, with the versions of constraints.txt.

PYTHON ?= python3

.PHONY: benchmarks demo test fuzz zoo clean

demo: .venv-demo/installed
	.venv-demo/bin/python examples/finetune.py --out examples/out

test: .venv-test/installed
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/mypy & types=$$!; \
	OMP_NUM_THREADS=1 .venv-test/bin/pytest -n auto --dist worksteal && wait $$types

fuzz: .venv-test/installed
	.venv-test/bin/python tests/fuzz.py --cases $(or $(CASES),10000) --seed $(or $(SEED),0)

zoo: .venv-zoo/installed
	PYTHONPATH=examples .venv-zoo/bin/python tests/zoo.py --out docs/zoo.md

benchmarks: .venv-test/installed
	.venv-test/bin/python docs/benchmarks/make_pages.py

.venv-demo/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	touch $@

.venv-test/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-test
	.venv-test/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,mmengine,onnx,test,trainers]'
	touch $@

.venv-zoo/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-zoo
	.venv-zoo/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,zoo]'
	touch $@

clean:
	rm -rf .venv-demo .venv-test .venv-zoo examples/out
