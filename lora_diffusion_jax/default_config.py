"""The base that every config starts from: all fields that exist, with their defaults."""

import inspect
from typing import Any

from ml_collections import ConfigDict, config_dict

from lora_diffusion_jax.diffusion.samplers import SAMPLERS
from lora_diffusion_jax.errors import choose


def base() -> ConfigDict:
    """Returns the full config of an unconditional EDM DDPM++ run; configs/ override parts of it.

    Durations are numbers of images seen. A size of 0 under `data` means: as the data set has it.
    """
    config = ConfigDict()
    config.class_conditional = False
    config.dtype = "float32"  # of the computation; parameters and moments stay float32
    config.init_from = ""  # weights to start from: a workdir, an official file, or hf://OWNER/NAME

    config.model = ConfigDict()
    config.model.name = "ddpmpp"  # ddpmpp | ncsnpp | adm | improved
    config.model.channels = 128
    config.model.channel_mult = (2, 2, 2)
    config.model.channel_mult_emb = 4
    config.model.num_blocks = 4
    config.model.attn_resolutions = (16,)  # heights of the levels with attention, and so with LoRA
    # Or these levels, whatever the image size: 0 is the finest, (1,) the second.
    config.model.attn_levels = config_dict.placeholder(tuple)
    config.model.dropout = 0.13
    config.model.label_dropout = 0.0
    config.model.augment_dim = 9  # width of the augmentation labels; 0 has no layer for them
    # None: what the network has by its name (ddpmpp and ncsnpp have these fields)
    config.model.embedding = config_dict.placeholder(str)  # positional | fourier
    config.model.encoder = config_dict.placeholder(str)  # standard | residual
    config.model.channel_mult_noise = config_dict.placeholder(int)
    config.model.resample_filter = config_dict.placeholder(tuple)
    # and these improved
    config.model.num_heads = config_dict.placeholder(int)
    config.model.num_heads_upsample = config_dict.placeholder(int)  # in the decoder; -1: num_heads
    config.model.use_scale_shift_norm = config_dict.placeholder(bool)
    # any network: twice the image's channels out, for mean and variance; None: as the preconditioning has
    config.model.learn_sigma = config_dict.placeholder(bool)

    config.precond = ConfigDict()
    config.precond.name = "edm"  # edm | vp | ve | iddpm | ddpm
    config.precond.sigma_data = 0.5  # this and the next two: edm only
    config.precond.p_mean = -1.2  # of ln sigma in training
    config.precond.p_std = 1.2
    # None: what the preconditioning has by its name; official checkpoints may differ
    for constant in ("sigma_min", "sigma_max", "beta_d", "beta_min", "epsilon_t", "c_1", "c_2"):
        config.precond[constant] = config_dict.placeholder(float)
    config.precond.num_steps = config_dict.placeholder(int)  # M of vp and iddpm, T of ddpm
    config.precond.schedule = config_dict.placeholder(str)  # ddpm: cosine | linear
    config.precond.loss = config_dict.placeholder(str)  # ddpm: hybrid | simple | vlb
    config.precond.rescale_timesteps = config_dict.placeholder(bool)  # ddpm: t 1000/T, or t itself

    config.lora = ConfigDict()
    config.lora.mode = "with_lora"  # baseline | with_lora | only_lora
    config.lora.adapter = "uc"  # uc | time | class | time_class | static
    config.lora.rank = 4
    config.lora.bases = 18  # the paper's TimeLoRA has 11; class has one per class
    config.lora.widths = (128, 64)  # uc: hidden widths of the composition MLP
    config.lora.num_timesteps = 0  # time: T, the table has T + 1 rows; 0: that of ddpm, else 4000
    config.lora.sites = r".*/(qkv|proj)"
    # In sampling alone: a factor of what the adapters add, and the noise levels at which they do.
    config.lora.scale = 1.0
    config.lora.interval = ()  # (low, high); (): all
    config.lora.scaled = ".*"  # of which adapters: a pattern for their paths, such as .*/class

    config.data = ConfigDict()
    config.data.name = ""  # a TFDS data set, or hf:OWNER/NAME or hf (with data_dir) of Hugging Face
    config.data.data_dir = ""  # where TFDS data sets are prepared; "" is TFDS's own default
    config.data.image_key = ""  # hf: the column of images, if there are several; npz: the array
    config.data.label_key = ""  # hf and npz: the column or array of labels, likewise
    config.data.path = ""  # or a folder or ZIP of images, or an array: .npy, .npz
    config.data.layout = "NHWC"  # of an array: NHWC | NCHW
    # Of an array of floats: a network sees (value - mean) / std, samples are values. One number or one
    # per channel; () leaves values as they are.
    config.data.mean = ()
    config.data.std = ()
    config.data.class_folders = False  # with path: the first folder of an image is its class
    config.data.background = ""  # colour behind transparent pixels, such as white; "" refuses them
    config.data.split = "train"
    config.data.eval_split = "test"
    config.data.eval_path = ""  # held-out images, instead of eval_split
    config.data.image_size = 0  # height, which names the U-Net's levels and places its attention
    config.data.image_width = 0  # 0: square
    config.data.channels = 0
    config.data.num_classes = 0
    config.data.class_names = ()  # one per class, unless they are its number; () is as the data set has
    config.data.floats = False  # an array of floats; filled in when a run starts
    config.data.fingerprint = ""  # of the training images; filled in when a run starts
    config.data.memory_limit_gib = 1.0  # smaller data sets are decoded once, larger ones stream
    config.data.workers = 0  # processes that decode streamed images; 0: threads of this one

    config.augment = ConfigDict()
    config.augment.p = 0.12  # probability of each transform; 0 leaves images alone

    config.train = ConfigDict()
    config.train.batch_size = 512
    config.train.microbatch = 0  # gradient accumulation in parts of this size; 0: all at once
    config.train.remat = "none"  # none | norms | blocks: less memory, more computation
    config.train.total_images = 200_000_000
    config.train.seed = 0
    config.train.learning_rate = 1e-3
    config.train.rampup_images = 10_000_000
    config.train.ema_halflife_images = 500_000
    config.train.ema_rampup_ratio = 0.05  # 0: the half-life is constant from the start
    config.train.freeze_base = False  # train the adapters alone
    # With freeze_base: train only the ClassLoRA pairs of the last N classes; 0: all adapters.
    config.train.new_classes = 0
    config.train.log_every = 51_200
    config.train.checkpoint_every = 2_560_000
    config.train.keep = 3  # newest checkpoints
    config.train.sample_every = 10_240_000
    config.train.eval_every = 0  # 0: only at the end
    config.train.max_nonfinite = 20  # steps in a row with a loss that is not finite

    config.sampler = sampler("edm")

    config.guidance = ConfigDict()  # D' + scale (D - D'), of a weaker D'
    config.guidance.name = "none"  # none | classifier_free | autoguidance | adapters
    config.guidance.scale = 1.0  # 1: D itself
    config.guidance.interval = ()  # (low, high) of the noise levels that are guided; (): all
    config.guidance.workdir = ""  # autoguidance: the run that D' comes from
    config.guidance.step = config_dict.placeholder(int)  # and its checkpoint; None: the newest
    config.guidance.lora_scale = 0.0  # adapters: lora.scale of D'

    config.eval = ConfigDict()
    config.eval.num_samples = 1_000  # of the evaluation during training; 0 leaves it out
    config.eval.final_num_samples = 0  # of the one at the end; 0: as many
    config.eval.num_steps = 0  # of all sampling during training; 0: config.sampler as it is
    # What samples are compared with: statistics of eval_fid.py ref, in their features (fid_2k); "":
    # the held-out images, in features of a classifier trained on the data set (fd_classifier_1k).
    config.eval.reference = ""
    config.eval.inception = ""  # weights file, where the reference is of Inception features

    config.log = ConfigDict()  # besides metrics.jsonl and TensorBoard
    config.log.wandb_project = ""  # of Weights & Biases (the extra wandb); "" leaves it out
    config.log.wandb_entity = ""  # a team or user; "": the account's default
    config.log.wandb_mode = ""  # online | offline; "": as $WANDB_MODE says, else online

    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices along the data axis; -1: all that fsdp leaves
    config.mesh.fsdp = 1
    return config


EXECUTION = ("batch_size", "fold")  # of the group `sampler`: how samples are computed, not which


def sampler(name: str, old: ConfigDict | None = None) -> ConfigDict:
    """The group `sampler` for one of `SAMPLERS`: the settings of that sampler and of no other.

    Args:
        name: key of `SAMPLERS`.
        old: the group that this one replaces. Fields in which it departs from its defaults keep their
            values where the new sampler has them too.

    Raises:
        UserError: there is no such sampler.
    """
    chosen = choose("sampler.name", name, SAMPLERS)
    group = ConfigDict({"name": name})
    for field, parameter in inspect.signature(chosen).parameters.items():
        default = parameter.default
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and field not in ("key", "noise"):
            # None: the sampler's own choice, here of a noise level
            group[field] = config_dict.placeholder(float) if default is None else default
    group.batch_size = 64  # images per call, all devices together
    # auto | on | off: where all images of a call have one class or none, fold the adapters into the base
    # at each noise level, once for all images; auto: if the call is large enough to gain by it
    group.fold = "auto"
    if old is not None:
        usual = sampler(old.name)
        group.update({k: v for k, v in old.items() if k in group and v != usual[k]})
    return group


def migrate_sampler(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved group `sampler` without what runs once saved: the settings of other samplers, and None."""
    own = sampler(saved.get("name", "edm"))
    others = {field for name in SAMPLERS for field in sampler(name)} - set(own)
    return {k: v for k, v in saved.items() if k not in others and v is not None}
