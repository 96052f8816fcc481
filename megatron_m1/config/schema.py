"""The typed configuration. Every key a user may set stands here, with its unit and its default.

`model.*` uses the key names of the released `config.json`, so that a Hugging Face configuration and ours read alike.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "BatchStage",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "LoggingConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RLConfig",
    "RewardConfig",
    "ScheduleConfig",
    "TaskSource",
    "TrainingConfig",
]


@dataclass
class ModelConfig:
    """Architecture. The defaults are MiniMax-M1 (456,089,655,296 parameters)."""

    vocab_size: int = 200064
    hidden_size: int = 6144
    num_hidden_layers: int = 80
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 9216
    """SwiGLU width of one expert."""
    num_local_experts: int = 32
    num_experts_per_tok: int = 2
    shared_intermediate_size: int = 0
    """Width of the shared expert, blended in by a sigmoid gate; 0: none."""
    attn_type_list: list[int] | None = None
    """Per layer: 0 lightning, 1 softmax. None: every eighth layer (7, 15, ...) is softmax."""
    rotary_dim: int = 64
    """Leading channels of each head that RoPE rotates (softmax layers only)."""
    rope_theta: float = 1e7
    max_position_embeddings: int = 10_240_000
    rms_norm_eps: float = 1e-5
    lightning_norm_eps: float = 1e-6
    """Epsilon of the RMSNorm over all heads of a lightning layer (fixed in the released code)."""
    postnorm: bool = True
    """True: the residual is the normed input of a sublayer; False: the un-normed one."""
    layernorm_linear_attention_alpha: float = 3.5565588200778455
    layernorm_linear_attention_beta: float = 1.0
    layernorm_full_attention_alpha: float = 3.5565588200778455
    layernorm_full_attention_beta: float = 1.0
    layernorm_mlp_alpha: float = 3.5565588200778455
    layernorm_mlp_beta: float = 1.0
    init: Literal["xavier", "normal"] = "xavier"
    """`xavier`: uniform Xavier for every matrix (MiniMax-Text-01); `normal`: N(0, init_std)."""
    init_std: float = 0.02

    def layer_types(self) -> list[int]:
        """List of num_hidden_layers ints: 0 lightning, 1 softmax."""
        if self.attn_type_list is not None:
            return list(self.attn_type_list)
        return [1 if (layer + 1) % 8 == 0 else 0 for layer in range(self.num_hidden_layers)]


@dataclass
class MoEConfig:
    """How the experts are trained (not part of the architecture)."""

    aux_loss: Literal["none", "global", "micro_batch"] = "micro_batch"
    """Tokens over which the load-balancing statistics f and m are taken. `micro_batch`: the sequences of one micro-batch, over
    all ranks that share them, so the loss is the same in every layout. `global` (MiniMax-Text-01's global router): the
    micro-batches of all data- and expert-parallel ranks that run at the same time; the same in every layout with the same
    training.micro_batch times data-parallel size. Padding is excluded, the losses of a step are averaged."""
    aux_loss_coefficient: float = 0.001
    aux_loss_form: Literal["megatron", "minimax", "hf"] = "megatron"
    """Normalisation at perfect balance, per layer: `megatron` 1, `minimax` 1/E^2 (as printed in the Text-01 report),
    `hf`: top-k."""
    z_loss_coefficient: float = 0.0
    capacity_factor: float | None = None
    """Tokens an expert takes, over the balanced share; the rest is dropped. None: no token is dropped."""
    dispatcher: Literal["alltoall", "allgather"] = "alltoall"


@dataclass
class ParallelConfig:
    """Sizes of the model-parallel groups; data parallelism is what remains of the world."""

    tensor: int = 1
    sequence: bool | None = None
    """Megatron sequence parallelism. None: on when tensor > 1."""
    pipeline: int = 1
    virtual_pipeline: int = 1
    """Model chunks per pipeline rank (interleaved schedule); 1: plain 1F1B."""
    last_stage_layers: int | None = None
    """Layers of the last pipeline rank, which also has the head; the others share the rest equally. None: all have the same."""
    context: int = 1
    """Ranks over which each sequence is spread, in zig-zag order."""
    context_layout: Literal["sequence", "document"] = "sequence"
    """What is cut into 2 * context chunks: the pack as a whole, documents crossing the borders, or every document by itself (Megatron's
    layout), padded to a multiple of 2 * context tokens, and the packs of a step to the longest of them."""
    context_lightning: Literal["auto", "ring", "all_gather"] = "auto"
    """How lightning states travel over the context-parallel ranks. `auto`: all_gather up to 64 MiB per rank and layer, else ring."""
    context_softmax: Literal["auto", "ring", "all_gather", "transformer_engine"] = "auto"
    """How keys and values of the softmax layers travel. `auto`: all_gather up to 64 MiB for the whole sequence, else ring.
    `transformer_engine`: attention and ring are Transformer Engine's (packs: with context_layout=document)."""
    expert: int = 1
    expert_tensor: int | None = None
    """None: the same as `tensor`."""
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    timeout_s: int = 600
    """Seconds after which a collective that a dead rank never joins ends the run."""


@dataclass
class BatchStage:
    """One stage of batch-size ramp-up: `global_batch` sequences per step from step `from_step` (0-based) on."""

    from_step: int
    global_batch: int


@dataclass
class TrainingConfig:
    """The run."""

    steps: int = 100
    seed: int = 1234
    micro_batch: int = 1
    """Sequences per micro-batch and data-parallel rank."""
    global_batch: int = 8
    """Sequences per optimizer step over all ranks."""
    batch_ramp: list[BatchStage] = field(default_factory=list)
    """Stages in rising order of `from_step`; before the first, `global_batch` holds."""
    seq_length: int = 2048
    """Tokens per sequence."""
    precision: Literal["fp32", "bf16"] = "bf16"
    grad_reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    recompute: Literal["none", "selective", "full"] = "none"
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    """For `selective`: any of core_attn, moe."""
    recompute_layers: int = 1
    """For `full`: layers per recomputed group."""
    head_chunk_tokens: int | None = None
    """Tokens of a micro-batch (and context-parallel rank) whose logits exist at the same time; with more, the backward pass computes
    the logits of each chunk again. None: what fits in 2 GiB of fp32 logits per rank."""
    head_products: Literal["fp32", "bf16x6", "bf16x3"] = "fp32"
    """How the fp32 head multiplies. `bf16x6`, `bf16x3`: fp32 sums of 6 or 3 products of bf16 parts, for tensor cores, which drop at most
    2^-23 or 2^-15 of each number's product; hidden states in bf16, one part, need 3 or 2. Decoding steps multiply in fp32."""
    lightning_strategy: Literal["auto", "fused", "segmented"] = "auto"
    """Of the Triton kernels of lightning attention, see `m1_kernels.lightning_attention`. `auto` follows the shapes; under a named one
    the bits of a document do not depend on what it is packed with. Where the kernels do not run, on a CPU, a named one is an error."""
    deterministic: bool = False
    """True: only algorithms that repeat bit by bit, at a cost in speed; an operation of a GPU that has none is an error.
    On CPU a run repeats bit by bit either way."""
    exit_after_s: float | None = None
    """Save and exit cleanly once the run has lasted this many seconds."""


@dataclass
class OptimizerConfig:
    """AdamW. Defaults are MiniMax-Text-01's."""

    lr: float = 2e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    """Global gradient norm after clipping; 0: no clipping."""


@dataclass
class ScheduleConfig:
    """Learning rate by step; `optimizer.lr` is its peak, `min_lr` what it decays to and keeps."""

    kind: Literal["constant", "cosine", "linear", "exponential", "wsd", "constant_decay"] = "cosine"
    """`constant`: warm-up, then the peak. `cosine`, `linear`, `exponential`: warm-up, then that decay until step
    `decay_steps`. `wsd`: warm-up, stable, decay over the last `decay_steps` steps of the run. `constant_decay`: M1's,
    warm-up, `constant_steps` at the peak, then decay over `decay_steps` steps."""
    warmup_steps: int = 0
    """Linear from peak / warmup_steps at step 0 to the peak at step warmup_steps - 1."""
    decay_steps: int | None = None
    """See `kind`. None: until the end of the run (`wsd` needs a number)."""
    constant_steps: int = 0
    """For `constant_decay`: steps at the peak after the warm-up."""
    decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "exponential"
    """Shape of the decay of `wsd` and `constant_decay`."""
    min_lr: float = 0.0


@dataclass
class DataConfig:
    """Token files made by tools/preprocess_data.py."""

    train: list[str] = field(default_factory=list)
    """Prefixes of .bin/.idx pairs."""
    train_weights: list[float] | None = None
    """Relative sampling weight of each prefix. None: by number of tokens."""
    valid: list[str] = field(default_factory=list)
    valid_weights: list[float] | None = None
    tokenizer: str | None = None
    """Directory with tokenizer.json; needed for text in and out only."""
    eod_token_id: int | None = None
    """End-of-document token. None: taken from the tokenizer."""
    document_boundaries: Literal["ignore", "reset"] = "reset"
    """`reset`: attention, lightning state and positions restart at each document; `ignore`: a sequence is one
    document."""
    num_workers: int = 0
    mock: bool = False
    """Random tokens instead of files, for benchmarks and tests."""


@dataclass
class EvaluationConfig:
    every_steps: int = 0
    """0: only before the first and after the last step, and only if data.valid is given."""
    batches: int = 8
    """Global batches per evaluation."""


@dataclass
class CheckpointConfig:
    save: str | None = None
    """Directory to write to; holds step_XXXXXXXX/ folders and the file `latest`."""
    load: str | None = None
    """Directory to resume from (`latest`), or one step_XXXXXXXX folder of it."""
    every_steps: int = 0
    """0: only at the end."""
    keep: int = 0
    """Newest checkpoints kept; 0: all."""
    async_save: bool = False
    weights_only: bool = False
    """Load only the weights: a fresh optimizer, schedule and data order (continual training, fine-tuning)."""


@dataclass
class LoggingConfig:
    dir: str | None = None
    """Directory of metrics.jsonl and the TensorBoard events. None: console only."""
    every_steps: int = 1
    tensorboard: bool = True
    layer_stats_every_steps: int = 0
    """Gradient norm and update-to-weight ratio by layer and slope group; 0: never."""
    peak_tflops: float | None = None
    """bf16 peak of one device in TFLOP/s, for MFU. None: known devices by name; else MFU is not logged."""


@dataclass
class TaskSource:
    """Where prompts and their verification come from."""

    kind: Literal["sort", "addition", "reasoning_gym", "file"]
    """`sort`, `addition`: made up as they are needed, see rl/tasks.py. `reasoning_gym`: a data set of that package. `file`: JSON
    lines {"prompt", "reward", "task"}, the reward one of exact, format, math, logic, code and the names in `rl.rewards`."""
    weight: float = 1.0
    """Share of the prompts, relative to the other sources."""
    size: int = 4
    """`sort`: digits to sort. `addition`: digits of each number."""
    dataset: str | None = None
    """`reasoning_gym`: name of the data set."""
    options: dict[str, Any] = field(default_factory=dict)
    """`reasoning_gym`: the data set's own settings of difficulty, such as {max_terms: 3}."""
    path: str | None = None
    """`file`: the training file."""
    held_out_path: str | None = None
    """`file`: the held-out file."""
    reward: str | None = None
    """Reward by which all of this source is judged. None: `exact` for what is made up, `logic` for `reasoning_gym`, that of each line
    for `file`."""


@dataclass
class RewardConfig:
    """A reward by a name of your own: a class (`target`), or others combined (`product` or `weights`)."""

    target: str | None = None
    """package.module:Class, a plug-in as rl/rewards/protocol.py describes it; or a built-in name, to give that one options."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keywords of the class: JSON values."""
    product: list[str] = field(default_factory=list)
    """Names of rewards that are multiplied, such as [format, math]."""
    weights: dict[str, float] = field(default_factory=dict)
    """Names of rewards that are added up with these weights, such as {math: 0.9, format: 0.1}. (Held-out answers count as right at 1.)"""


@dataclass
class WindowStage:
    """An output window and what the report changes with it (section 5: a smaller clip and eps_high while extending)."""

    max_new_tokens: int
    is_weight_cap: float | None = None
    """None: rl.is_weight_cap."""
    clip_grad: float | None = None
    """None: optimizer.clip_grad."""


@dataclass
class CurriculumPoint:
    """Relative weights of rl.tasks at a generation batch, one for each source in order."""

    step: int
    weights: list[float]


@dataclass
class RLConfig:
    """Reinforcement learning (the `rl` command). `training.steps` counts generation batches, `training.global_batch` the samples of
    one update, and packs hold `training.micro_batch` * `training.seq_length` tokens. Sampling is at temperature 1."""

    tasks: list[TaskSource] = field(default_factory=list)
    algorithm: Literal["cispo", "grpo", "dapo", "reinforce", "reinforce_corrected"] = "cispo"
    """Preset of rl/losses.py; each of the next seven keys that is not null replaces the preset's value."""
    is_weight_cap: float | None = None
    """Absolute upper bound of the importance weight (M1's 1 + eps_high)."""
    is_weight_floor: float | None = None
    """Absolute lower bound of the importance weight; CISPO has none."""
    mask_eps_low: float | None = None
    mask_eps_high: float | None = None
    """Epsilons of the PPO mask, relative to 1."""
    correction_cap: float | None = None
    """Upper bound of the truncated importance correction pi_old / pi_rollout."""
    normalization: Literal["per_group", "batch_token", "sample", "combined"] | None = None
    sample_share: float | None = None
    """Share of `sample` in the normalisation `combined`."""
    advantage_std: Literal["population", "sample", "none"] = "population"
    samples_per_prompt: int = 16
    """Samples of one prompt, whose rewards are compared."""
    updates_per_batch: int = 16
    """Optimizer steps per generation batch, each on `training.global_batch` of its samples."""
    max_new_tokens: int = 1024
    """Tokens of a response at most; the last of `windows`, if there are any."""
    windows: list[WindowStage] = field(default_factory=list)
    """Output windows, rising, on from one to the next when the perplexity of the samples has converged and the 99th percentile of
    their lengths is near the window (MiniMax-M1, section 5). []: `max_new_tokens` throughout."""
    window_patience: int = 20
    """Generation batches over which both signals are taken."""
    window_tolerance: float = 0.01
    """Converged: the means of the older and the newer half differ by at most this share."""
    window_near_share: float = 0.95
    """Near: at least this share of the window, in each of these batches."""
    curriculum: list[CurriculumPoint] = field(default_factory=list)
    """Weights of the sources by generation batch, linear between the points, in place of `tasks[].weight` in training. (Held-out
    prompts keep those.)"""
    easy_above: float = 1.0
    """Prompts with a higher pass rate are not asked again; 1: all are. For sources whose prompts come back."""
    hard_below: float = 0.0
    """Prompts with a lower pass rate are not asked again; 0: all are."""
    pass_rate_attempts: int = 16
    """Samples of a prompt before its pass rate counts."""
    pass_rate_window: int = 64
    """Of more samples than this the older ones count half, so that the rate follows the policy."""
    engine: Literal["fast", "reference"] = "fast"
    """`reference`: every token by a whole training forward pass, so that on CPU in fp32 training finds the same bits."""
    routing_replay: bool = True
    """Send every token of the training passes to the experts that it had when it was sampled; how they are weighed is still the gate's."""
    slots: int = 64
    """Sequences generated at a time on one data-parallel rank."""
    cache_tokens: int | None = None
    """Tokens of keys and values per softmax layer on a rank, of which a sequence takes its longest possible length when it starts.
    None: enough for all slots."""
    dynamic_sampling: bool = True
    """Leave out prompts whose samples all have the same reward, and sample others in their place."""
    refills: int = 2
    """Further rounds of sampling at most; what is missing then makes the updates smaller."""
    truncated: Literal["score", "zero", "drop"] = "score"
    """Responses cut off at `max_new_tokens`: judged as they are, given reward 0, or left out."""
    repetition_tokens: int = 3000
    """A response ends after so many consecutive tokens that each had more than `repetition_probability` (M1's stop); 0: never."""
    repetition_probability: float = 0.99
    repetitive: Literal["score", "zero", "drop"] = "score"
    """Responses that ended so: as `truncated`."""
    overlong_tokens: int = 0
    """DAPO's soft penalty on the last so many tokens before `max_new_tokens`; 0: none."""
    rewards: dict[str, RewardConfig] = field(default_factory=dict)
    """Rewards beside the built-in ones, for `tasks[].reward` and the lines of task files."""
    reward_workers: int = 2
    """Processes that judge what one data-parallel rank has generated."""
    reward_timeout_s: float = 10.0
    reward_max_error_share: float = 0.05
    """More rewards than this in error stop the run."""
    held_out_prompts: int = 0
    """Prompts of the held-out evaluation before the first and after the last step; 0: none."""
    held_out_samples: int = 4
    """Samples of each (the k of avg@k)."""
    held_out_pass_at: list[int] = field(default_factory=list)
    """Every k of pass@k, at most `held_out_samples`; []: that number alone."""
    held_out_every_steps: int = 0
    journal: str | None = None
    """Directory of the journals, one per step or evaluation and replica, that keep every sample and verdict; a resumed run takes those
    that are finished from there. After a change of a reward's code name another one."""
    journal_keep: int | None = None
    """Journals older than so many steps before the newest checkpoint are deleted. None: those that no checkpoint kept by
    `checkpoint.keep` needs; with keep=0 none are."""
    pages: bool = True
    """Write logging.dir/rollouts/step_XXXXXXXX.html."""


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
