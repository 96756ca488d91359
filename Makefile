# Each target sets up what it needs in .venv by itself, and does so again only when pyproject.toml or constraints.txt
# have changed. Options:
#   make train ARGS="--epochs 3 --out runs/first"     options of train_jax.py
#   make bench ARGS="--quick --threads 1"             options of benchmarks/train_step.py
#   make train EXTRA=cuda                             with JAX for NVIDIA GPUs (or EXTRA=tpu)
#   make test PYTHON=python3.12                       another Python, 3.11 or newer
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(if $(shell command -v $(name)),$(name))))
ARGS ?=
EXTRA ?=
VENV := .venv
# Without a Python of its own any more (an upgrade of the system's), a .venv is of no use: it is made anew.
VENV_WORKS := $(shell $(VENV)/bin/python -c pass 2>/dev/null && echo yes)
INSTALL = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: help train test faults fuzz parity mistakes published bench speed exactness docs study accelerators browser package versions lint format clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:
	@echo "make train   train BLeNet on Fashion-MNIST with JAX; options: make train ARGS=--help"
	@echo "make test    run the whole suite, PyTorch included"
	@echo "make faults  kill training runs at 50 random moments, and see that nothing is lost"
	@echo "make fuzz    damage files, and see that every reader says in one line what is wrong: a minute for each reader"
	@echo "make parity  compare this project's own two wings: every layer, mode, dtype, convention and shape"
	@echo "make mistakes   plant every known porting mistake, and write docs/parity_mistakes.md and docs/gallery.md"
	@echo "make published  check Hugging Face's Flax classes against its PyTorch ones, and write docs/published.md"
	@echo "make bench   time a training step, then batch norm, beside their peers in JAX and PyTorch; figures and a plot go"
	@echo "             to runs/bench; in two minutes instead of half an hour: make bench ARGS=--quick"
	@echo "make speed   the same and the step at other sizes, and whole runs, written to docs/*_speed.md"
	@echo "make exactness   measure batch norm's errors beside its peers, and write docs/batch_norm_exactness.md"
	@echo "make study   train BLeNet some hundred times, in both wings, with batch norm and without, and write"
	@echo "             docs/accuracy.md and docs/why_batch_norm.md; hours, and continued where it was stopped"
	@echo "make accelerators   compile steps for a TPU v5e and an H100, which need not be here, beside Flax's; fails with an"
	@echo "             all-reduce or 5 % of traffic more than in docs/accelerators.json"
	@echo "make docs    build the site from docs/, in an environment of its own; a warning is an error"
	@echo "make browser   look at the HTML report in Chromium, by axe-core's rules, and make its pictures in docs/ (needs npm)"
	@echo "make package    build sdist and wheel into dist/, look at them as registries do, install the wheel in two new"
	@echo "             environments, with PyTorch and without, and use it there"
	@echo "make versions   the lowest versions that pyproject.toml allows, and the newest, each in a new environment, used"
	@echo "             and tested"
	@echo "make lint    check format, lint and types; make format puts the format right"
	@echo "make clean   remove .venv, those of other targets, and what was built"

train: $(VENV)/installed-train$(EXTRA)
	$(VENV)/bin/python train_jax.py $(ARGS)

test: $(VENV)/installed-test
	$(VENV)/bin/python -m pytest $(ARGS)

faults: $(VENV)/installed-test
	$(VENV)/bin/python -m parity_tests.faults $(ARGS)

fuzz: $(VENV)/installed-test
	$(VENV)/bin/python -m parity_tests.fuzz $(ARGS)

parity: $(VENV)/installed-test
	$(VENV)/bin/python -m parity check $(ARGS)

mistakes: $(VENV)/installed-test
	$(VENV)/bin/python -m parity_tests.parity.planted_table --write docs/parity_mistakes.md $(ARGS)
	$(VENV)/bin/python -m parity_tests.parity.gallery --write docs/gallery.md

published: $(VENV)-published/installed
	@mkdir -p runs
	$(VENV)-published/bin/python -m parity_tests.published --rows runs/published.json --write docs/published.md $(ARGS)

bench: $(VENV)/installed-bench
	@mkdir -p runs/bench
	$(VENV)/bin/python -m benchmarks.train_step --json runs/bench/train_step.json $(ARGS)
	$(VENV)/bin/python -m benchmarks.batch_norm --json runs/bench/batch_norm.json $(filter --quick,$(ARGS))

speed: $(VENV)/installed-bench
	$(VENV)/bin/python -m benchmarks.train_step --scaling --write docs/train_step_speed.md $(ARGS)
	$(VENV)/bin/python -m benchmarks.batch_norm --write docs/batch_norm_speed.md $(filter --quick,$(ARGS))
	$(VENV)/bin/python -m benchmarks.whole_run --write docs/whole_run_speed.md

exactness: $(VENV)/installed-bench
	$(VENV)/bin/python -m benchmarks.exactness --write docs/batch_norm_exactness.md

study: $(VENV)/installed-test
	$(VENV)/bin/python -m benchmarks.accuracy --runs runs/accuracy --write docs/accuracy.md $(ARGS)
	$(VENV)/bin/python -m benchmarks.why_batch_norm --runs runs/why_batch_norm --write docs/why_batch_norm.md

# An environment of its own, with the compilers for TPUs and NVIDIA GPUs; those of JAX's version, without the libraries
# that a GPU would need.
accelerators: .venv-accelerators/installed
	.venv-accelerators/bin/python -m benchmarks.accelerators $(or $(ARGS),--against docs/accelerators.json)

.venv-accelerators/installed: pyproject.toml constraints.txt
	@echo "installing JAX's compilers for accelerators: some 500 MB to download, once"
	$(PYTHON) -m venv --clear .venv-accelerators
	.venv-accelerators/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[tpu]'
	version=$$(.venv-accelerators/bin/python -c 'import jaxlib; print(jaxlib.__version__)') && \
	  .venv-accelerators/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  jax-cuda12-plugin==$$version jax-cuda12-pjrt==$$version
	@touch $@

docs: $(VENV)-docs/installed
	$(VENV)-docs/bin/python -m sphinx --fail-on-warning --keep-going --quiet docs docs/_build/html
	@echo "the site is in docs/_build/html"

$(VENV)-docs/installed: docs/requirements.txt
	@echo "installing what builds the site, once"
	@$(PYTHON) -m venv --clear $(VENV)-docs
	@$(VENV)-docs/bin/python -m pip install --quiet --disable-pip-version-check --requirement docs/requirements.txt
	@touch $@

package: $(VENV)-package/installed
	$(VENV)-package/bin/python -m parity_tests.package $(ARGS)

$(VENV)-package/installed: Makefile
	@$(PYTHON) -m venv --clear $(VENV)-package
	@$(VENV)-package/bin/python -m pip install --quiet --disable-pip-version-check build check-wheel-contents twine
	@touch $@

versions:
	$(PYTHON) -m parity_tests.versions $(ARGS)

# Chromium is the system's, or else Playwright's own.
browser: $(VENV)/installed-browser
	$(VENV)/bin/python -m parity_tests.browser --pictures docs

$(VENV)/installed-browser: $(VENV)/installed-test
	$(INSTALL) '.[browser]'
	npm install --no-save --silent axe-core@4
	command -v chromium chromium-browser google-chrome >/dev/null || $(VENV)/bin/python -m playwright install chromium
	@touch $@

lint: $(VENV)/installed-test
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m mypy

format: $(VENV)/installed-test
	$(VENV)/bin/python -m ruff format .
	$(VENV)/bin/python -m ruff check --fix .

clean:
	rm -rf $(VENV) $(VENV)-published $(VENV)-docs $(VENV)-package docs/_build dist

$(VENV)/created: $(if $(VENV_WORKS),,remake)
	@echo "setting up $(VENV) with $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

.PHONY: remake
remake:

$(VENV)/installed-train$(EXTRA): $(VENV)/created pyproject.toml constraints.txt
	@echo "installing what training needs: some 150 MB to download, once"
	$(INSTALL) '.$(if $(EXTRA),[$(EXTRA)])'
	@touch $@

$(VENV)/installed-bench: $(VENV)/created pyproject.toml constraints.txt
	@echo "installing the libraries to compare with, PyTorch included, once"
	$(INSTALL) '.[bench]'
	@touch $@

$(VENV)/installed-test: $(VENV)/created pyproject.toml constraints.txt
	@echo "installing what the tests need, PyTorch included, once"
	$(INSTALL) '.[test]'
	@touch $@

# The last line of transformers with Flax classes, which needs older neighbours than the tests have: apart from them.
$(VENV)-published/installed: pyproject.toml constraints.txt
	@echo "installing transformers and what it needs, PyTorch included, once"
	$(PYTHON) -m venv --clear $(VENV)-published
	$(VENV)-published/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[torch]' transformers==4.57.3
	@touch $@
