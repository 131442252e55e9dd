"""How the commands of the documentation are shortened where tests run them."""

# Config file -> fields that its copy in the scratch folder sets in the end of get_config().
_NETWORK = {
    "model.channels": 16,
    "model.num_blocks": 1,
    "lora.bases": 3,
    "lora.widths": (16, 8),
    "train.batch_size": 8,
    "train.total_images": 32,
    "train.log_every": 8,
    "train.checkpoint_every": 8,
    "eval.num_samples": 0,
    "sampler.batch_size": 16,
}
_EDM = {**_NETWORK, "sampler.num_steps": 2}
_DISCRETE = {
    **_NETWORK,
    "precond.num_steps": 50,
    "model.channels": 32,
    "eval.num_steps": 2,
    "sampler.num_steps": 10,
}
_PICTURES = {  # stands in for a data set of 32x32 colour images in ten classes
    "data.name": "",
    "data.path": "cifar10.zip",
    "data.class_folders": True,
}
CONFIGS = {
    "digits": _EDM,
    "digits_guided": _EDM,
    "digits_iddpm": _DISCRETE,
    "cifar10_edm": {**_EDM, **_PICTURES, "model.channel_mult": (1, 2, 2)},
    "cifar10_iddpm": {**_DISCRETE, **_PICTURES, "model.channel_mult": (1, 1, 1, 1)},
    "sweeps/digits_rank": {},  # is made of digits
}

# Text of a block -> what is run instead.
TEXT = {
    "--seeds=0-63": "--seeds=0-3",
    "--seeds=0-99": "--seeds=0-9",
    "--seeds=0-7": "--seeds=0-1",
    "--num=1500": "--num=40",
    "--num=100": "--num=2",
    "--num=32": "--num=2",
    "sampler.num_steps=250": "sampler.num_steps=10",
    "sampler.num_steps=10 ": "sampler.num_steps=3 ",
    "guidance.step=400": "guidance.step=2",
    "train.total_images=25600": "train.total_images=32",
    "eval.num_samples=500": "eval.num_samples=0",
    "lora.rank=1,2,4": "lora.rank=1",
    "data.data_dir=parquet": "data.data_dir=parquet --config.data.path='' --config.data.class_folders=False",
    "data.path=latents.npz": "data.path=latents.npz --config.data.class_folders=False",
}

# Blocks that no test runs, by the reason that stands above them; their commands are checked nevertheless.
NOT_RUN = {
    "CONTRIBUTING.md": ["they run the tests themselves"],
    "examples/README.md": ["tests/test_examples.py runs them", "installs published packages"],
    "docs/evaluation.md": [
        "needs CIFAR-10 prepared by TFDS and downloads the Inception weights",
    ],
    "docs/reproducing.md": [
        "needs CIFAR-10 and ImageNet, and downloads the Inception weights",
        "needs the official checkpoints and Inception features",
        "needs the official checkpoints, and a day of a GPU for each",
        "needs the official checkpoint, and hours of a GPU for each",
        "needs the official checkpoint, and days of a GPU for each",
    ],
    "docs/recipes.md": [
        "installs CUDA",
        "trains for days",
        "a script for Slurm",
        "rents a TPU",
        "installs JAX for TPUs",
        "rents TPUs",
    ],
    "docs/checkpoints.md": ["uploads to the Hugging Face Hub"],
    "docs/own-data.md": ["downloads CIFAR-10"],
    "docs/results.md": ["takes an hour of two cores", "takes over an hour of two cores"],
    "docs/scaling.md": ["installs the TPU compiler", "needs a bucket"],
}

# Pages whose Python blocks another test runs, with the names that they presuppose.
ELSEWHERE = {
    "README.md": "tests/test_examples.py",
    "docs/own-networks.md": "tests/test_examples.py",
}
# A block that takes arguments, which another test gives it.
WITH_ARGUMENTS = {"docs/checkpoints.md": ("sys.argv[1]", "tests/modes/test_sampler_export.py")}
