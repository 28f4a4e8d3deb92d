"""Installs treerl: `pip install -e .[test]`, with `cuda` or `tpu` added on an accelerator."""

from setuptools import find_packages, setup

setup(
    name="treerl",
    version="0.1.0",
    description="Reinforcement learning of language models with tree rollouts, in JAX",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["treerl", "treerl.*", "launch", "launch.*", "experiments", "experiments.*"]),
    package_data={"treerl.draw": ["page.html"]},
    install_requires=[
        "jax>=0.10,<0.13",
        "flax",
        "optax",
        "orbax-checkpoint",
        "etils[epath]",  # paths, also of object stores
        "chex",
        "einops",
        "tensorflow-datasets",  # tfds.data_source reads without TensorFlow
        "array_record",
        "absl-py",
        "ml-collections",
        "matplotlib",
        "tensorboardX",  # the format of event files, without TensorFlow
        "tqdm",
        "safetensors>=0.5.3",  # files of published weights
        "numpy",
        "tokenizers",  # of published models
        "huggingface_hub",  # models by name; tokenizers needs it too
        "jinja2",  # their chat templates
        "gguf",  # models in that format
        "math-verify",  # whether two answers are the same in mathematics
        "scipy",  # intervals
    ],
    extras_require={
        "cuda": ["jax[cuda12]"],
        "tpu": ["jax[tpu]", "gcsfs"],
        "gcs": ["gcsfs"],  # workdirs on gs://
        "gym": ["reasoning-gym"],  # a hundred text tasks
        "textworld": ["textworld"],  # text adventures; builds a part in C
        "png": ["resvg-py"],  # trees as PNG
        "wandb": ["wandb"],  # metrics to Weights & Biases
        "test": [
            "pytest",
            "pytest-xdist",
            "ruff>=0.17,<0.18",
            "typeguard",
            "resvg-py",
            "nbclient",
            "ipykernel",
            "reasoning-gym",
            "wandb",
            "gcsfs",
            "gcp-storage-emulator",
        ],
        "peers": ["google-tunix", "torch", "transformers", "peft"],  # measured beside treerl by launch.bench
        "notebooks": ["jupyter"],
    },
)
