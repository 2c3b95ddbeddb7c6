"""What `hf-mcsmoe inspect` measures on text and on weights: how specialised experts are."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_mcsmoe.calibration.inputs import num_sequences
from hf_mcsmoe.calibration.specialisation import measure_specialisation
from hf_mcsmoe.cli.display import console, stage_bars, table_of
from hf_mcsmoe.cli.options import described
from hf_mcsmoe.cli.shares import counts_of, parsed
from hf_mcsmoe.cli.sources import KINDS, Calibration
from hf_mcsmoe.data.text import labelled_samples
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.layers.loading import load_model, load_tokenizer
from hf_mcsmoe.methods.specialisation import stable_ranks
from hf_mcsmoe.progress import counted, one_step
from hf_mcsmoe.tables import specialisation_rows

FIELDS = [
    "data",
    "label_column",
    "column",
    "target_column",
    "split",
    "num_samples",
    "max_length",
    "batch_size",
    "seed",
]
STABLE_RANK = "also tell the mean stable rank of the experts' matrices, sum(s^2) / max(s^2); reads all weights"


@dataclass(frozen=True)
class Specialising(Calibration):
    """The text on which it is measured how specialised experts are."""

    data: list[str] | None = described(  # type: ignore[assignment]
        None, f"text to measure on how specialised the experts are, {KINDS}; several are labels of their text"
    )
    label_column: str | None = described(None, "column of the data with a label that experts may specialise in")
    num_samples: int = described(256, "samples to measure on", min=1)

    def __post_init__(self) -> None:
        """Take no data as none, and refuse what says nothing without data.

        Raises:
            ValueError: a label column without a single data set.
        """
        object.__setattr__(self, "data", list(self.data or []))
        if self.label_column and len(self.data or []) != 1:
            raise ValueError(f"--label-column {self.label_column} is a column of one --data: name that, and no other.")
        super().__post_init__()

    def labelled(
        self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
    ) -> dict[str, list[dict[str, torch.Tensor]]]:
        """Return batches of each label, or else of each data set."""
        shares: list[float | None]
        if self.label_column:
            (name, _), *_ = parsed(self.data or [])
            columns = {"column": self.column, "target_column": self.target_column}
            samples = labelled_samples(name, self.label_column, **columns, split=self.split)
            shares = [float(len(part)) for part in samples.values()]
        else:
            read = self.read()
            samples = {part.name: part.samples for part in read}
            told = any(part.share is not None for part in read)
            shares = [part.share if told else float(len(part.samples)) for part in read]
        return self.batches_of(samples, counts_of(shares, self.num_samples), tokenizer, model)


def show_measured(model: str, text: Specialising, *, dequantize: bool, stable_rank: bool) -> None:
    """Load a model that is not compressed, and print what is measured on text and on its weights."""
    tokenizer = load_tokenizer(model) if text.data else None
    with stage_bars() as progress:
        with one_step("loading", progress):
            layers = Layers.of(load_model(model, dequantize=dequantize)).uncompressed()
        labelled = text.labelled(tokenizer, layers.model) if tokenizer else {}
        measured = measure_specialisation(layers, labelled, progress) if tokenizer else {}
        chosen = [*layers] if stable_rank else []
        ranks = {layer.name: _ranks(layer) for layer in counted(chosen, "stable rank", progress)}
    if measured:
        rows = sum(num_sequences(batch) for batches in labelled.values() for batch in batches)
        console.print(f"specialisation of the experts on {rows:,} samples, entropies in nats", highlight=False)
        if len(labelled) > 1:
            console.print(f"labels: {', '.join(labelled)}", highlight=False, markup=False)
        console.print(table_of(specialisation_rows(measured)))
    if ranks:
        console.print("mean stable rank of the experts' matrices", highlight=False)
        roles = list(next(iter(ranks.values())))
        console.print(table_of([["layer", *roles], *([name, *part.values()] for name, part in ranks.items())]))


def _ranks(layer: MoELayer) -> dict[str, str]:
    with layer.open() as experts:
        return {role: f"{value:.1f}" for role, value in stable_ranks(experts).items()}
