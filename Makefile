# One verb per need. `make demo` and `make test` do their own set-up.
PYTHON ?= python3
FULL := .venv
LIGHT := .venv-runtime
WEB := runtime/web

.PHONY: setup demo dist test test-full test-runtime test-web test-browser lint docs fuzz emoji quality check clean

setup: $(FULL)/ready $(LIGHT)/ready

# Everything: training, export, recipe, tests. torch is pinned: other versions download gigabytes of CUDA.
$(FULL)/ready: pyproject.toml runtime/pyproject.toml models/emoji/pyproject.toml
	$(PYTHON) -m venv $(FULL)
	$(FULL)/bin/pip install --quiet torch==2.13.0
	$(FULL)/bin/pip install --quiet -e "runtime[cpu]" -e models/emoji -e ".[recipe,dev,docs,browser]"
	$(FULL)/bin/pip install --quiet --no-deps spandrel==0.4.2 einops  # Its torchvision would replace torch.
	touch $@

# What an application has: the runtime and the default model.
$(LIGHT)/ready: runtime/pyproject.toml models/emoji/pyproject.toml
	$(PYTHON) -m venv $(LIGHT)
	$(LIGHT)/bin/pip install --quiet -e "runtime[cpu]" -e models/emoji "pytest>=9.2,<10" "pytest-xdist>=3.8,<4"
	touch $@

demo: $(LIGHT)/ready
	$(LIGHT)/bin/tiue-runtime generate "a red heart" --seed 1 --out heart.png

# Wheels for machines without a checkout: pip install --find-links dist "tiue-runtime[cpu]" tiue-emoji
dist: $(LIGHT)/ready
	rm -rf dist build runtime/build models/emoji/build
	$(LIGHT)/bin/pip wheel --quiet --no-deps --wheel-dir dist ./runtime ./models/emoji .

test: test-web test-runtime test-full

# The package for JavaScript. Its tests need Node and the packages of its lock file, nothing of Python.
test-web:
	@if command -v npm >/dev/null; then $(MAKE) --no-print-directory $(WEB)/node_modules/ready && cd $(WEB) && npm test --silent; \
	else echo "runtime/web: Node is not installed, so the tests of the package for JavaScript do not run"; fi

# In Debian's Chromium, or the browser that the environment variable CHROMIUM names: minutes.
test-browser: $(WEB)/node_modules/ready $(FULL)/ready
	cd $(WEB) && npm run --silent test:browser
	npm install --silent --no-save --prefix build/browser axe-core@4.14
	$(FULL)/bin/python -m pytest -m browser

# onnxruntime-node would download CUDA in its install script.
$(WEB)/node_modules/ready: $(WEB)/package-lock.json
	cd $(WEB) && npm ci --ignore-scripts --silent
	touch $@

test-runtime: $(LIGHT)/ready
	$(LIGHT)/bin/python -m pytest runtime/tests -n auto --dist loadfile --no-loadscope-reorder

# Of the runtime's tests, those for which the light environment lacks a package, or has another version than this one.
AGAIN := $(wildcard runtime/tests/test_server*.py) \
	$(addprefix runtime/tests/test_,batch.py completion.py gradio_app.py import.py pull.py ray.py schema.py tokenizer.py)

# One thread for each worker: more would wait for each other. Long tests come early, since the runtime's are short.
test-full: $(FULL)/ready
	OMP_NUM_THREADS=1 $(FULL)/bin/python -m pytest tests $(AGAIN) -m "not slow and not gpu and not browser" -n auto --dist loadfile --no-loadscope-reorder

lint: $(FULL)/ready
	$(FULL)/bin/ruff check
	$(FULL)/bin/ruff format --check
	$(FULL)/bin/pyright --pythonpath $(FULL)/bin/python

# The documentation site, as build/site/index.html. A dead link or a file from another host fails.
docs: $(FULL)/ready
	$(FULL)/bin/python -m website

# 20,000 damaged files: half an hour. The test of the same name runs a few hundred.
fuzz: $(FULL)/ready
	$(FULL)/bin/python tests/fuzzer.py --cases 20000 --seed 1

check: lint docs test

# An update on a CPU frees and takes the same large blocks. With these, glibc keeps them, and saves a tenth to a fifth.
KEEP_MEMORY := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=16000000000

# The paper's comparison: a small teacher, then every method. It should take 3 hours of 2 cores. Begun again, it goes on.
quality: $(FULL)/ready
	$(KEEP_MEMORY) $(FULL)/bin/python -m recipes.emoji --preset small --out runs/small --until polish
	$(KEEP_MEMORY) $(FULL)/bin/python -m recipes.quality --preset small --source runs/small --out runs/quality

# Makes a model from scratch. The teacher alone takes about four hours on 2 cores with AVX-512.
# Stopped and begun again, it goes on.
emoji: $(FULL)/ready
	$(KEEP_MEMORY) $(FULL)/bin/python -m recipes.emoji --preset cpu --out runs/emoji

clean:
	rm -rf $(FULL) $(LIGHT) $(WEB)/node_modules $(WEB)/dist $(WEB)/src/generated .cache dist build runtime/build models/emoji/build heart.png
