"""A recipe: what a run trains on, how, and for how long. TOML in, unknown keys refused, saved beside the weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from llava_edge.errors import InputError

Stage = Literal["align", "finetune", "norms"]
SourceFormat = Literal["llava", "flickr8k", "coco", "webdataset"]
PromptName = Literal["plain", "v1", "llava_v1", "vicuna_v1", "mistral_instruct", "chatml", "chatml_direct"]


@dataclass(frozen=True)
class ModelConfig:
    """What the model is made of when ``init`` names no LLaVA, and which blocks of its tower are trained.

    ``llm`` and ``vision_tower`` are directories or hub names that transformers loads. ``feature_layers`` count
    hidden states from the input (0) or from the end (-1); their features stand side by side. ``class_token`` says
    whether the tower puts one in front of its patches (CLIP does, SigLIP does not). ``tower_blocks`` is the number
    of the tower's last blocks, of those that the features pass through, that a finetune trains.
    """

    llm: str = ""
    vision_tower: str = ""
    projector: Literal["linear", "mlp2x_gelu"] = "mlp2x_gelu"
    feature_layers: tuple[int, ...] = (-2,)
    class_token: bool = True
    tower_blocks: int = 0

    def __post_init__(self) -> None:
        if bool(self.llm) != bool(self.vision_tower):
            raise InputError("model.llm and model.vision_tower belong together; one of them is missing")
        if not self.feature_layers or self.tower_blocks < 0:
            raise InputError("model.feature_layers is empty, or model.tower_blocks is below 0")


@dataclass(frozen=True)
class SourceConfig:
    """One set of samples.

    ``path`` is LLaVA JSON (or JSON lines), a file of captions, or tar shards as a pattern (``shards/*.tar``).
    ``images`` is the folder of the pictures, by default the one that ``path`` lies in. ``split`` chooses from
    captions by split. ``weight`` is the share of the draws; left out everywhere, each sample comes once an epoch.
    """

    path: str
    format: SourceFormat = "llava"
    images: str | None = None
    split: str = "train"
    weight: float | None = None

    def __post_init__(self) -> None:
        if self.weight is not None and not self.weight > 0:
            raise InputError(f"data.sources: weight is {self.weight}; expected a number above 0")


@dataclass(frozen=True)
class DataConfig:
    """Which samples, and how they become tokens.

    ``sources`` are sets of samples by name. Instead, ``samples`` names one JSON file that holds LLaVA samples by
    source, with ``weights`` by the same names and ``features``, the cached features of all their pictures by name; the
    projector is then trained on standardised features. ``branches`` is the most samples of one picture that share a
    reading of it. ``image_tokens`` and ``image_token_weights`` are the counts that the grid of visual tokens is pooled
    to, one drawn a step (arXiv 2405.17430); empty is the whole grid. ``packing`` lays samples one after the other up to
    ``max_length``, each attending to itself only. ``image_position`` "random" puts the picture before or after the
    first question. ``image_mode`` overrides how pictures are fitted to the tower's square. ``cache_features`` is a
    folder of features keyed by content; where the tower's last blocks are trained, of what enters them. ``skip_bad``
    counts samples that can't be read, where an error would stop the run. ``workers`` is the number of threads that
    prepare steps ahead.
    """

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    samples: str | None = None
    images: str | None = None
    features: str | None = None
    weights: dict[str, float] = field(default_factory=dict)
    format: PromptName = "chatml"
    max_length: int = 2048
    packing: bool = False
    branches: int = 1
    image_position: Literal["first", "random"] = "first"
    image_mode: Literal["pad", "crop", "squash"] | None = None
    image_tokens: tuple[int, ...] = ()
    image_token_weights: tuple[float, ...] = ()
    cache_features: str | None = None
    skip_bad: bool = False
    workers: int = 1

    def __post_init__(self) -> None:
        if bool(self.sources) == bool(self.samples):
            raise InputError("data needs either sources or samples", hint="See the recipes that come with llava-edge.")
        if self.weights and not self.samples:
            raise InputError("data.weights belongs to data.samples", hint="Sources have their weight beside them.")
        if len(self.image_tokens) != len(self.image_token_weights):
            raise InputError("data.image_tokens and data.image_token_weights differ in length")
        if self.features and self.cache_features:
            raise InputError("data.features and data.cache_features exclude each other")
        for name in ("branches", "max_length", "workers"):
            if getattr(self, name) < 1:
                raise InputError(f"data.{name} is {getattr(self, name)}; expected at least 1")
        if self.branches > 1 and self.format == "plain":
            raise InputError("data.branches above 1 needs a format with questions; plain has none")
        if self.branches > 1 and self.image_position == "random":
            raise InputError("data.branches above 1 needs data.image_position first: samples share their beginning")
        weighted = [name for name, source in self.sources.items() if source.weight is not None]
        if weighted and len(weighted) != len(self.sources):
            raise InputError("data.sources: either every source has a weight or none has one")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on all linear layers of the LLM, merged at the end; ``rank`` 0 is none.

    A finetune without them trains the whole LLM.
    """

    rank: int = 0
    alpha: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise InputError(f"lora.rank is {self.rank}; expected 0, which is no adapters, or more")
        if self.rank and self.alpha <= 0:
            raise InputError(
                f"lora.alpha is {self.alpha}; expected a number above 0",
                hint="Adapters are multiplied by alpha / rank: with 0 they do nothing. Twice the rank is usual.",
            )
        if not 0 <= self.dropout < 1:
            raise InputError(f"lora.dropout is {self.dropout}; expected 0 or more and below 1")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with a cosine schedule. The run ends after ``steps`` or ``epochs``, or when ``max_minutes`` are over.

    The schedule follows whichever is further on, so a run that time cuts short still ends annealed. ``batch_size``
    is the samples of one step over all processes (pictures, where samples share them), and ``micro_batch_rows``
    the rows that one forward pass takes; None is all. The loss of a step is the mean over its labelled tokens,
    however they are spread. A step whose loss is more than ``spike_factor`` times the median of the last 50 stops
    the run; 0 never does.
    """

    lr: float
    steps: int | None = None
    epochs: float | None = None
    projector_lr: float | None = None
    tower_lr: float | None = None
    batch_size: int = 16
    micro_batch_rows: int | None = None
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float = 1.0
    max_minutes: float | None = None
    spike_factor: float = 5.0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise InputError("optim needs either steps or epochs")
        for name in ("steps", "epochs", "lr", "batch_size", "micro_batch_rows", "max_minutes", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"optim.{name} is {value}; expected a number above 0")
        if not 0 <= self.warmup_ratio < 1:
            raise InputError(f"optim.warmup_ratio is {self.warmup_ratio}; expected 0 or more and below 1")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"optim.betas is {list(self.betas)}; expected two numbers from 0 to below 1")


@dataclass(frozen=True)
class ScaleConfig:
    """How the machine is used.

    ``precision`` "bf16" keeps what is trained in float32 and computes in bfloat16; "auto" is "bf16" where the device
    computes in it, and "float32" elsewhere (a CPU without such instructions takes many times as long in bfloat16).
    ``sharding`` "fsdp2" divides weights and optimiser over the processes. ``attention`` is the name of transformers'
    implementation; "auto" is "eager" on a CPU and "sdpa" on a GPU, and "flash_attention_2" needs packing with one row a
    pass and no branches. ``compile`` compiles the layers that are trained with torch.compile, which a CPU needs a C++
    compiler for. ``peak_tflops`` of one device is needed for the MFU where the device isn't known.
    """

    precision: Literal["auto", "bf16", "float32"] = "auto"
    gradient_checkpointing: bool = False
    sharding: Literal["none", "fsdp2"] = "none"
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    compile: bool = False
    peak_tflops: float | None = None


@dataclass(frozen=True)
class DevConfig:
    """A fixed set of questions that the model answers every ``every`` steps; ``source`` is as under data.sources."""

    source: SourceConfig
    every: int = 100
    count: int = 4
    max_tokens: int = 32

    def __post_init__(self) -> None:
        for name in ("every", "count", "max_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"dev.{name} is {getattr(self, name)}; expected at least 1")


@dataclass(frozen=True)
class RewardConfig:
    """Captions that the model draws at each step and that a score judges, learnt from beside the samples.

    ``source`` names the samples whose pictures and first questions are taken, ``references`` those whose answers are
    people's captions of them; both are in ``data.samples``. A step takes ``pictures`` of them with one question, and
    ``draws`` captions of each at ``temperature``; what is longer than ``max_tokens`` scores nothing. ``weight`` is
    that of this loss beside the samples' mean loss.
    """

    source: str
    references: str
    pictures: int = 16
    draws: int = 5
    temperature: float = 1.0
    max_tokens: int = 24
    weight: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("pictures", 1), ("draws", 2), ("max_tokens", 1)):
            if getattr(self, name) < least:
                raise InputError(f"reward.{name} is {getattr(self, name)}; expected at least {least}")
        for name in ("temperature", "weight"):
            if not getattr(self, name) > 0:
                raise InputError(f"reward.{name} is {getattr(self, name)}; expected a number above 0")


@dataclass(frozen=True)
class Recipe:
    """One stage of training, from the checkpoint ``init``, or the parts in ``model``, to the checkpoint ``output``.

    ``init`` and ``output`` are directories; ``keep`` is the number of saved states that are kept. ``rounded`` is for
    the stage ``norms``: a bundle of ``init``, for whose quantised language model the norms are tuned.
    """

    stage: Stage
    output: str
    data: DataConfig
    optim: OptimConfig
    init: str | None = None
    rounded: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    dev: DevConfig | None = None
    reward: RewardConfig | None = None
    seed: int = 0
    log_every: int = 10
    save_every: int = 100
    keep: int = 2

    def __post_init__(self) -> None:
        if self.stage == "align" and (self.lora.rank or self.model.tower_blocks):
            raise InputError("stage align trains the projector only; set lora.rank and model.tower_blocks to 0")
        if self.stage == "norms" and (self.lora.rank or self.model.tower_blocks or self.init is None):
            raise InputError("stage norms trains the norms of init only; set lora.rank and model.tower_blocks to 0")
        if (self.stage == "norms") != (self.rounded is not None):
            raise InputError("stage norms and rounded, the bundle that the norms are tuned for, belong together")
        if self.stage == "norms" and self.scale.sharding != "none":
            raise InputError(f"stage norms keeps two language models whole; scale.sharding is {self.scale.sharding}")
        if (self.init is None) == (not self.model.llm):
            raise InputError("a recipe needs either init, a LLaVA checkpoint, or model.llm and model.vision_tower")
        if self.scale.attention == "flash_attention_2" and (
            self.data.branches > 1 or not self.data.packing or self.optim.micro_batch_rows != 1
        ):
            raise InputError(
                "scale.attention flash_attention_2 needs data.packing, data.branches = 1 and optim.micro_batch_rows = 1"
            )
        if self.reward and not (self.data.samples and self.data.features and self.stage == "finetune"):
            raise InputError("reward needs stage finetune, data.samples and data.features")
        if self.reward and self.scale.attention == "flash_attention_2":
            raise InputError("reward shares a reading of the picture among the draws; flash_attention_2 can't")
        for name in ("log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are saved beside the weights."""
        return asdict(self)
