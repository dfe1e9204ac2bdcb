"""Two packages: `dgr_jax` (the method) and `dgr_kernels` (kernels that know nothing of it)."""

from setuptools import find_packages, setup

KERNELS = find_packages("kernels")

setup(
    name="dgr_jax",
    version="0.1.0",
    description="Distribution-Grounded Refinement of safety data for large reasoning models, in JAX",
    python_requires=">=3.12",
    packages=find_packages(include=["dgr_jax", "dgr_jax.*"]) + KERNELS,
    package_dir={package: "kernels/" + package.replace(".", "/") for package in KERNELS},
    package_data={"dgr_jax": ["assets/*", "assets/tiny_lrm/*", "planning/h100.txtpb"]},
    install_requires=[
        "jax>=0.11.1,<0.13",
        "jaxtyping>=0.3",
        "flax>=0.12.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.3,<0.13",
        "transformers>=5.21,<6",
        "safetensors>=0.6",
        "jinja2>=3.1",
        "datasets>=4",
        "scipy>=1.14",
        "tqdm>=4.66",
        "tensorflow-datasets>=4.9.10",
        "absl-py>=2",
        "ml_collections>=1",
        "etils[epath]",
        "filelock>=4.2",
        "matplotlib>=3.9",
        "numpy>=2",
    ],
    extras_require={
        "test": ["pytest>=8", "pytest-xdist", "hypothesis", "beartype", "ruff", "pyright"],
        "parity": ["torch>=2.9", "accelerate", "peft>=0.19"],
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        "eval": ["math-verify[antlr4_11_0]>=0.9"],
        "harness": ["lm_eval>=0.4.13,<0.5", "pytablewriter>=0.60"],
        "tensorboard": ["tensorboardX"],
        "gcs": ["gcsfs"],
        "gguf": ["gguf>=0.17"],
    },
)
