"""The model card of a merged model, generated from what was done."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Template
from transformers import PreTrainedModel
from yaml import YAMLError

from hf_mcsmoe.evaluation.costs import Account, cost_rows
from hf_mcsmoe.layers.loading import is_repo_id, public_name
from hf_mcsmoe.methods.config import REGISTRIES
from hf_mcsmoe.modeling.configuration_mcsmoe import auto_map
from hf_mcsmoe.modeling.losparse_mcsmoe import final_rows, sparse_parts
from hf_mcsmoe.modeling.saving_mcsmoe import DOCUMENTS, MODEL_ID, source_folder
from hf_mcsmoe.plan import MergePlan

# Auto classes by which a card loads its model, before others that serve it too, and the Hub's name of their task.
PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForSeq2SeqLM": None,  # the Hub dropped the name
}

# What the table of costs stands between, so that it can be renewed.
COSTS = ("<!-- costs -->", "<!-- /costs -->")

TEMPLATE = Template(
    """
# {{ title }}

{% if fewer -%}
{{ base }} with fewer experts: the experts of each layer were merged by **M-SMoE**
([Merge, Then Compress](https://arxiv.org/abs/2310.01334), ICLR 2024) with
`hf_mcsmoe` {{ versions.hf_mcsmoe }}. The router is the original one; a map sends
its choice among the original experts to the stored ones.
{%- else -%}
{{ base }}, all of its experts kept by `hf_mcsmoe` {{ versions.hf_mcsmoe }}
([Merge, Then Compress](https://arxiv.org/abs/2310.01334), ICLR 2024): none were merged.
{%- endif %}

{{ costs }}

## How to load

```python
from transformers import {{ auto_class }}

model = {{ auto_class }}.from_pretrained("{{ model_id }}", trust_remote_code=True)
```

The modelling code lies beside the weights; no further package is needed. Where the package `hf_mcsmoe` is imported,
it loads without the flag.

## Method

| step | method | paper |
|---|---|---|
{% for step, method, paper in steps -%}
| {{ step }} | {{ method }} | {{ paper }} |
{% endfor %}
Calibrated on {{ "{:,}".format(tokens) }} tokens. Options and groups in full: `mcsmoe_plan.json`.

## Experts per layer

| layer | before | after |
|---|---:|---:|
{% for name, (old, new) in layers.items() -%}
| `{{ name }}` | {{ old }} | {{ new }} |
{% endfor -%}
{% if whole %}
Left whole: {{ whole | join(", ") }}.
{% endif %}
## Citation

```bibtex
@inproceedings{li2024merge,
  title     = {Merge, Then Compress: Demystify Efficient {SMoE} with Hints from Its Routing Policy},
  author    = {Li, Pingzhi and Zhang, Zhenyu and Yadav, Prateek and Sung, Yi-Lin and Cheng, Yu and Bansal, Mohit and
               Chen, Tianlong},
  booktitle = {International Conference on Learning Representations},
  year      = {2024}
}
```
""",
    keep_trailing_newline=True,
)


def model_card(
    model: PreTrainedModel, plan: MergePlan, layers: dict[str, tuple[int, int]], accounts: Mapping[str, Account]
) -> str:
    """Return the card's text, with the metadata that the Hub reads.

    Args:
        model: the merged model.
        layers: experts before and after, per layer name.
        accounts: costs of the original model and of this one.
    """
    source, fewer = model.name_or_path or "", any(new < old for old, new in layers.values())
    auto_class = loading_class(model)
    text = TEMPLATE.render(
        title=f"{public_name(source).rpartition('/')[2] or plan.provenance['model_type']} "
        + ("with merged experts" if fewer else "with its own experts"),
        fewer=fewer,
        base=f"[{source}](https://huggingface.co/{source})"
        if is_repo_id(source)
        else f"A model of type `{plan.provenance['model_type']}`",
        versions=plan.provenance["versions"],
        costs=_cost_table(accounts),
        auto_class=auto_class,
        model_id=MODEL_ID,
        steps=method_steps(plan.config),
        tokens=max(plan.provenance["tokens"].values()),
        layers=layers,
        whole=[f"`{name}`" for name in plan.provenance["tokens"] if name not in layers],
    )
    return f"---\n{_metadata(source, auto_class).to_yaml()}\n---\n{text}"


def adopt_card(model: PreTrainedModel) -> bool:
    """Let a model that was loaded carry the card and the plan that lay beside its weights, to be saved with it.

    Returns whether it has a card with a table of costs, which can be renewed.
    """
    if not cast(Any, model).mcsmoe_files:
        vars(model)["mcsmoe_files"] = _loaded_files(model)
    card = cast(Any, model).mcsmoe_files.get("README.md", "")
    return all(mark in card for mark in COSTS)


def add_to_card(model: PreTrainedModel, title: str, text: str) -> None:
    """Let the card that `model` is saved with say what was done after the merge; `renew_costs` is done as well.

    A section of the same title is replaced. A model that was loaded goes on with the card of its folder or repository;
    where that has none, nothing is written.
    """
    renew_costs(model)
    files = cast(Any, model).mcsmoe_files
    if "README.md" not in files:
        return
    heading = f"## {title}\n"
    card = re.sub(rf"^{re.escape(heading)}.*?(?=^## |\Z)", "", files["README.md"], flags=re.MULTILINE | re.DOTALL)
    before, citation, after = card.partition("## Citation\n")
    card = f"{before.rstrip()}\n\n{heading}\n{text.strip()}\n\n{citation}{after}".rstrip() + "\n"
    vars(model)["mcsmoe_files"] = {**files, "README.md": card}


def renew_costs(model: PreTrainedModel) -> None:
    """Let the card's table of costs tell, in its last column, how large a changed model is now.

    What only a forward would tell is taken out of it. A model without such a table stays without.
    """
    if not adopt_card(model):
        return
    files, sizes = cast(Any, model).mcsmoe_files, _sizes(model)
    start, end = (files["README.md"].index(mark) for mark in COSTS)
    mark, head, rule, *rows = files["README.md"][start:end].splitlines()
    _, *stages, saved = _cells(head)
    lines = [mark, _line(["", *stages[:-1], "after", saved]), rule]
    for row in map(_cells, rows):
        first, size = row[1].replace(",", ""), sizes.get(row[0])
        gain = f"{1 - size / int(first):.1%}" if size is not None and first.isdigit() else ""
        lines.append(_line([*row[:-2], "" if size is None else f"{size:,}", gain]))
    card = files["README.md"][:start] + "\n".join(lines) + "\n" + files["README.md"][end:]
    vars(model)["mcsmoe_files"] = {**files, "README.md": card}


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row[1:-1].split("|")]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _loaded_files(model: PreTrainedModel) -> dict[str, str]:
    """Return the card and the plan beside the weights that a model was loaded from, as if it had been made here."""
    loaded_from = model.name_or_path or ""
    source = source_folder(loaded_from, vars(model.config).get("_commit_hash"))
    if source is None:
        return {}
    files = {name: (source / name).read_text("utf-8") for name in DOCUMENTS if (source / name).is_file()}
    name = source.name if Path(loaded_from).is_dir() else loaded_from
    card = files.get("README.md", "").replace(f'from_pretrained("{name}"', f'from_pretrained("{MODEL_ID}"')
    return files | ({"README.md": card} if card else {})


def _sizes(model: PreTrainedModel) -> dict[str, int]:
    """Return, by row of the table of costs, the sizes of a model as it is saved: S compact, without adapters."""
    own = [(name, tensor) for name, tensor in model.named_parameters() if ".lora_" not in name]
    buffers, saved = dict(model.named_buffers()), model.state_dict().keys()
    parameters = sum(tensor.numel() for _, tensor in own)
    size = sum(tensor.numel() * tensor.element_size() for tensor in [*dict(own).values(), *buffers.values()])
    unsaved = sum(tensor.numel() * tensor.element_size() for name, tensor in buffers.items() if name not in saved)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rows yet to be pruned are spoken of when they are
        kept = final_rows(model, model.config.mcsmoe.get("keep"))
    for name, part in sparse_parts(model).items():
        rows = int(kept[name].sum())
        gone = (kept[name].numel() - rows) * part.weight.shape[-1]
        parameters -= gone
        size += rows * torch.int32.itemsize - kept[name].numel() - gone * part.weight.element_size()
    return {"parameters": parameters, "bytes": size, "bytes on disk": size - unsaved}


def describe_costs(model: PreTrainedModel, accounts: Mapping[str, Account]) -> None:
    """Put a table of costs, a column per account, into the card that is saved with `model`, for the one that is there.

    Raises:
        ValueError: the model has no card, because it was loaded and not made here.
    """
    files = vars(model).get("mcsmoe_files", {})
    if "README.md" not in files:
        raise ValueError("The model carries no card to describe its costs in; merge_experts makes one that does.")
    start, end = (files["README.md"].index(mark) for mark in COSTS)
    card = files["README.md"][:start] + _cost_table(accounts) + files["README.md"][end + len(COSTS[1]) :]
    vars(model)["mcsmoe_files"] = {**files, "README.md": card}


def _cost_table(accounts: Mapping[str, Account]) -> str:
    head, *rows = map(_line, cost_rows(accounts))
    columns = "|---|" + "---:|" * (len(accounts) + 1)
    return "\n".join([COSTS[0], head, columns, *rows, COSTS[1]])


def loading_class(model: PreTrainedModel) -> str:
    """Return the Auto class that loads the model's own class."""
    entries = auto_map(model.config.base_model_type).items()
    names = [name for name, path in entries if path.rpartition(".")[2] == type(model).__name__]
    return next((name for name in names if name in PIPELINES), names[0] if names else "AutoModel")


def _metadata(source: str, auto_class: str) -> ModelCardData:
    return ModelCardData(
        base_model=source if is_repo_id(source) else None,
        **source_licence(source),
        library_name="transformers",
        pipeline_tag=PIPELINES.get(auto_class),
        tags=["mcsmoe", "mixture-of-experts", "model-compression", "custom_code", "arxiv:2310.01334"],
    )


def source_licence(source: str) -> dict[str, Any]:
    """Return the licence that the source's own card declares, with its name and link; empty where it declares none."""
    folder = source_folder(source)
    card = folder / "README.md" if folder else None
    if card is None or not card.is_file():
        return {}
    try:
        declared = ModelCard.load(card).data.to_dict()
    except (ValueError, YAMLError):  # a card that nobody can read declares nothing
        return {}
    return {key: declared[key] for key in ("license", "license_name", "license_link") if key in declared}


def method_steps(config: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return step, method and link to the method's paper, a row each, of a plan's options."""
    steps = []
    for stage, registry in REGISTRIES.items():
        method = registry.methods.get(config[stage])
        paper = f"[arXiv {method.paper}](https://arxiv.org/abs/{method.paper})" if method and method.paper else ""
        steps.append((stage, config[stage], paper))
    kept = f"{config['experts']} per layer" if isinstance(config["experts"], int) else f"{config['experts']:.0%}"
    return [("experts kept", kept, ""), *steps, ("aligned to", config["reference"], "")]
