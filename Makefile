# make demo     from nothing to the picture: environment, corpus, four models, sweep, samples
# make results  the papers' claims in miniature: RESULTS.md
# make test     lint and tests
# make gpu      what only a GPU can tell: out/gpu/report.md

PYTHON ?= python3
PY := .venv/bin/python
DEMO := out/demo
# A run that was stopped goes on where it was; a finished one is left alone.
from = --init_from=$(if $(wildcard $(DEMO)/$(1)/*.pt),resume,scratch)

.PHONY: demo results test gpu

demo: .venv/installed
	$(PY) train.py config/demo.toml --out_dir=$(DEMO)/normal $(call from,normal)
	$(PY) train.py config/demo.toml --out_dir=$(DEMO)/stochastic --router_p=0.5 $(call from,stochastic)
	$(PY) train.py config/demo.toml --out_dir=$(DEMO)/stochastic-shared-v --plan=shared-v --router_p=0.3 --router_lowest=1 $(call from,stochastic-shared-v)
	$(PY) train.py config/demo.toml --out_dir=$(DEMO)/fusedkv --plan=fusedkv $(call from,fusedkv)
	$(PY) sweep.py --out_dir $(addprefix $(DEMO)/,normal stochastic stochastic-shared-v fusedkv)
	$(PY) sample.py --out_dir $(DEMO)/stochastic --plan full --plan cla:2 --plan keep:0 --start "def main(" --max_new_tokens 64
	@echo "look at $(DEMO)/cache_vs_loss.png"

results: .venv/installed-dev  # to fine-tune, the studies write and read Hugging Face folders
	$(PY) -m lab.studies all

test: .venv/installed-dev
	.venv/bin/ruff check .
	$(PY) -m pytest -n auto

gpu:  # with the Python that is there, which has a torch for its GPU
	$(PYTHON) -m lab.gpu

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nanokv needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(PY) -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@
