"""Published combinations of methods by name, as data: what each is made of, and what it is called with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from hf_mcsmoe.low_rank.config import KEEP, LoSparseConfig
from hf_mcsmoe.methods.budget import MEASURED
from hf_mcsmoe.methods.choice import AUTO
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.methods.registry import unknown
from hf_mcsmoe.repair.methods import RepairConfig
from hf_mcsmoe.sparsity.config import SparsityConfig


@dataclass(frozen=True)
class Preset:
    """A combination under a name.

    `paper` is an arXiv identifier or empty; `text` says in a sentence what it does, and `differs` where that is not
    what was published. `merge` are options of `MergeConfig`; `repair` is the method of a `RepairConfig`; `rank` and
    `keep` are those of a `LoSparseConfig`, None where experts stay dense. `sparsify` is the score by which weights
    inside experts are left out; all experts stay then, and what else would be their share is that of the weights.
    """

    name: str
    text: str
    paper: str = ""
    differs: str = ""
    merge: Mapping[str, Any] = field(default_factory=dict)
    repair: str = "none"
    rank: int | None = None
    keep: float | None = None
    sparsify: str = ""

    def options(self, experts: int | float = 0.5, **others: Any) -> dict[str, Any]:
        """Return what `compress` is called with, by its arguments' names.

        Args:
            experts: how many to keep; see `MergeConfig`. With `sparsify` the share of the weights that stays.
            others: further options of `MergeConfig`, which override the preset's.

        Raises:
            ValueError: see `MergeConfig` and `SparsityConfig`; a number of experts where weights are left out.
        """
        sparsity = self._sparsity(experts)
        low_rank = None if self.rank is None else LoSparseConfig(rank=self.rank, keep=self.keep or KEEP)
        return {
            "config": MergeConfig(**{**self.merge, **others, "experts": 1.0 if sparsity else experts}),
            "repair": None if self.repair == "none" else RepairConfig(method=self.repair),
            "low_rank": low_rank,
            "quantization": None,
            **({"sparsity": sparsity} if sparsity else {}),
        }

    def _sparsity(self, share: int | float) -> SparsityConfig | None:
        if not self.sparsify:
            return None
        if isinstance(share, int):
            raise ValueError(
                f"{self.name} keeps all experts and leaves out weights inside them: in place of {share} experts give "
                "the share of the weights that stays (0.5)."
            )
        return SparsityConfig(self.sparsify, share=1 - share)

    def command_line(self) -> dict[str, Any]:
        """Return the options of `hf-mcsmoe compress` that say the same, by their names with underscores."""
        stored = {"rank": self.rank, "keep": self.keep, "sparsify": self.sparsify}
        return {**self.merge, "repair": self.repair, **{key: value for key, value in stored.items() if value}}


@dataclass(frozen=True)
class TrainedPreset:
    """A combination that trains: `options` are those of `hf-mcsmoe distill`; the others as in `Preset`."""

    name: str
    text: str
    paper: str
    differs: str
    options: Mapping[str, Any]


TRAINED = {
    "task-specific": TrainedPreset(
        "task-specific",
        "prunes the experts that training batches use least, one after the other while the model is fine-tuned",
        "2206.00277",
        "experts go by a cubic schedule, as many in each layer; routers are cut to those that stay, nothing is masked",
        {"kd_weight": 0.0, "freeze_routers": False},
    )
}


class Presets(dict[str, Preset]):
    """Presets by name; a name that none has is a ValueError that says what was meant."""

    def __missing__(self, name: str) -> NoReturn:
        check_untrained(name)
        raise ValueError(unknown("preset", name, [*self, *TRAINED]))


def check_untrained(name: str) -> None:
    """Raise ValueError where a preset trains, which `hf-mcsmoe distill` does, and nothing else."""
    if name in TRAINED:
        raise ValueError(
            f"{name} prunes a model while that is trained, which takes a task and its steps: run `hf-mcsmoe distill "
            f"MODEL --teacher MODEL --preset {name} --experts 0.5`."
        )


_ALL = [
    Preset(
        "msmoe",
        "aligns all to the first expert, merges around the most frequent by router logits, weighted by frequency",
        paper="2310.01334",
        merge={
            "saliency": "frequency",
            "similarity": "router_logits",
            "budget": "adaptive",
            "reference": "first",
        },
    ),
    Preset(
        "mcsmoe",
        "msmoe, then stored as low rank + sparse: rank 32, a tenth of S",
        paper="2310.01334",
        differs="what is kept of S is chosen at once; `hf-mcsmoe distill` trains it as published",
        merge={
            "saliency": "frequency",
            "similarity": "router_logits",
            "budget": "adaptive",
            "reference": "first",
        },
        rank=32,
        keep=KEEP,
    ),
    Preset(
        "average",
        "msmoe without alignment and with equal weights",
        paper="2310.01334",
        merge={
            "saliency": "frequency",
            "similarity": "router_logits",
            "budget": "adaptive",
            "alignment": "none",
            "weighting": "uniform",
        },
    ),
    Preset(
        "hc-smoe",
        "clusters experts by their mean outputs for the same tokens, average linkage; averages by frequency",
        paper="2410.08589",
        differs="outputs are of a sample of up to 1,024 tokens a layer",
        merge={
            "saliency": "frequency",
            "similarity": "expert_output",
            "grouping": "hierarchical",
            "budget": "uniform",
            "alignment": "none",
        },
    ),
    Preset(
        "ream",
        "lets salient experts take those most like them by gated outputs and logits; averages by saliency, aligned",
        paper="2604.04356",
        differs="layers do not see what became of those before them; outputs are of a sample of 1,024 tokens a layer",
        merge={
            "saliency": "reap",
            "similarity": "gated_mixture",
            "grouping": "pseudo_pruning",
            "budget": "uniform",
            "alignment": "activation_weight_matching",
            "router": "dominant",
        },
    ),
    Preset(
        "uncurl",
        "clusters experts by router logits, spectrally; aligns and averages by frequency",
        paper="2409.01483",
        differs="details that the summaries leave open are ours: affinity (1 + cos) / 2, weights by counts; no tuning",
        merge={
            "saliency": "frequency",
            "similarity": "router_logits",
            "grouping": "spectral",
            "budget": "uniform",
        },
    ),
    Preset(
        "dek",
        "clusters experts by the CKA of their outputs, average linkage; averages them and their rows of the router",
        paper="2407.09590",
        differs="how groups form and with which weights they are averaged was not to be read, and is ours",
        merge={
            "saliency": "frequency",
            "similarity": "cka",
            "grouping": "hierarchical",
            "budget": "uniform",
            "alignment": "none",
            "weighting": "uniform",
            "router": "mean",
        },
    ),
    Preset(
        "sub-moe",
        "clusters experts by the cosine of outputs, k-means; averages by frequency in the directions of all members",
        paper="2506.23266",
        differs="k-means is of the rows of similarity; as many directions are kept as one expert has",
        merge={
            "saliency": "frequency",
            "similarity": "output_cosine",
            "grouping": "kmeans",
            "budget": "uniform",
            "alignment": "none",
            "merging": "svd",
        },
    ),
    Preset(
        "mergemoe",
        "averages with output matrices by least squares to the members' outputs; as many groups in each layer",
        paper="2510.14436",
        differs="groups are msmoe's; the fit is to a sample of up to 1,024 tokens a layer, with a small ridge",
        merge={
            "saliency": "frequency",
            "similarity": "router_logits",
            "budget": "uniform",
            "merging": "regression",
        },
    ),
    Preset(
        "moe-pruner",
        "leaves out weights of each row by |w| times the norm of gated inputs; zeros save no bytes; --experts 1.0",
        paper="2410.12013",
        differs="all layers are scored in one pass, on what the original's layers see; no tuning",
        sparsify="moe_pruner",
    ),
    Preset(
        "frequency-prune",
        "prunes the experts that fewest tokens reach, as many in each layer",
        paper="2310.01334",
        merge={"reduce": "prune", "saliency": "frequency", "budget": "uniform"},
    ),
    Preset(
        "reap",
        "prunes the experts whose gated outputs are smallest for the tokens that reach them, as many in each layer",
        paper="2510.13999",
        merge={"reduce": "prune", "saliency": "reap", "budget": "uniform"},
    ),
    Preset(
        "naee",
        "tries all subsets of a layer's experts for the one that changes its output least, as many in each layer",
        paper="2402.14800",
        differs="outputs are of a sample of up to 1,024 tokens a layer; for layers of few experts alone",
        merge={"reduce": "prune", "saliency": "frequency", "selection": "exhaustive", "budget": "uniform"},
    ),
    Preset(
        "router-norm",
        "lets experts give nothing whose rows of the router grew least since before fine-tuning (--base-model)",
        paper="2405.16646",
        merge={"reduce": "prune", "saliency": "router_norm_change", "budget": "uniform", "pruned_router": "zero"},
    ),
    Preset(
        "mone",
        "prunes the experts that are used least and vary least; where they are picked, their mean output stands in",
        paper="2507.00390",
        merge={"reduce": "prune", "saliency": "fluctuation", "budget": "uniform", "pruned_router": "constant"},
    ),
    Preset(
        "ours",
        "merges or prunes by contribution, where and how many by measured effect; each layer trained by itself",
        merge={"reduce": AUTO, "saliency": "contribution", "budget": MEASURED},
        repair="local",
    ),
]
PRESETS = Presets({preset.name: preset for preset in _ALL})
