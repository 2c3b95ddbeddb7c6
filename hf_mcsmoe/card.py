"""The model card: rendered from a model's record whenever that changes, and never read back."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, metadata_load, metadata_save
from jinja2 import Template
from yaml import YAMLError

from hf_mcsmoe.methods.config import REGISTRIES
from hf_mcsmoe.modeling.saving_mcsmoe import (
    BYTES_ON_DISK,
    MODEL_ID,
    SAVED,
    SECTION,
)
from hf_mcsmoe.record import LOW_RANK, Calibration, Record, Stored
from hf_mcsmoe.tables import (
    bits_of,
    cost_rows,
    done_to,
    in_place_of,
    layer_rows,
    layers_of,
    quality_rows,
    size_lines,
    title_of,
)

# Auto classes by which a card loads its model, before others that serve it too, and the Hub's name of their task.
PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForSeq2SeqLM": None,  # the Hub dropped the name
}
# Those that write text to text alone.
WRITERS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
# What a card declares of its licence.
LICENCE = ("license", "license_name", "license_link")
# What the metadata call the figures of a stage.
METRICS = {"loss": ("loss", "Loss"), "kl": ("kl_divergence", "KL to the original")}
# The same on text of another kind.
CHECK_METRICS = {f"check_{name}": metric for name, metric in METRICS.items()}

TEMPLATE = Template(
    """\
{{ marks[0] }}
<!-- This section is generated, and written anew when the model changes. What you write outside of it stays. -->

# {{ title }}

{% if "merged" in done -%}
{{ base }} with fewer experts: the experts of {{ layers_of("merge") }} were merged by **M-SMoE**
([Merge, Then Compress](https://arxiv.org/abs/2310.01334), ICLR 2024) with
`hf_mcsmoe`{{ version }}.
{%- if plain %} It is an ordinary model of its family.
{%- else %} The router is the original one; a map sends
its choice among the original experts to the stored ones.
{%- endif %}
{%- elif "pruned" in done -%}
{{ base }} with fewer experts: those of {{ layers_of("prune") }} that are missed least were pruned by
`hf_mcsmoe`{{ version }}, and
{%- if constants %} the routers left as they are: a pick of one that is gone gives {{ constants }} in its
place.
{%- else %} the routers cut to the others.
{%- endif %}
{%- else -%}
{{ base }}, all of its experts kept by `hf_mcsmoe`{{ version }}
([Merge, Then Compress](https://arxiv.org/abs/2310.01334), ICLR 2024): none were merged.
{%- endif %}
{%- if "merged" in done and "pruned" in done %}
In {{ layers_of("prune") }} experts were pruned instead, and the routers cut to the others.
{%- endif %}
{%- if bits %}
Experts are stored in {{ bits }}.
{%- endif %}
{% if quality %}
## Quality

{{ quality }}

In nats per position, on {{ held_out }} that no statistic, repair or factor was fitted to.
KL is the divergence from the original's distributions.
{%- if check %} The other text is {{ check }}, of which nothing was fitted to either.
{%- else %} On text of other kinds the model may lose more.
{%- endif %}
{% endif %}{% if costs %}
## Costs

{{ costs }}
{% endif %}
## How to load

{% if engine -%}
```bash
{{ engine }} serve {{ model_id }}
```

The format is of {{ engine }} alone: Transformers and other engines do not load it.
{% else -%}
```python
{% if writes -%}
from transformers import {{ auto_class }}, AutoTokenizer

model = {{ auto_class }}.from_pretrained("{{ model_id }}"{{ trust }})
tokenizer = AutoTokenizer.from_pretrained("{{ model_id }}"{{ trust }})
inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
tokens = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=50)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
{%- else -%}
from transformers import {{ auto_class }}

model = {{ auto_class }}.from_pretrained("{{ model_id }}"{{ trust }})
{%- endif %}
```

{% if plain -%}
It is a checkpoint of its family's own class: no further code or package is needed.
{%- else -%}
The modelling code lies beside the weights; no further package is needed. Where the package `hf_mcsmoe` is imported,
it loads without the flag.
{%- endif %}

## Use it with

**PEFT**: `LoraConfig(**hf_mcsmoe.lora_targets(model))` adapts the experts as well; `target_modules="all-linear"` does
not see them.{% if not plain %} **TRL** (DPO and others): `model_init_kwargs={"trust_remote_code": True}`.{% endif %}
**lm-eval**: `lm_eval --model hf --model_args pretrained={{ model_id }}{{ argument }} --tasks ...`.
{% if dense -%}
**torchao**, 8 bits a weight, the experts' among them:

```python
from hf_mcsmoe import lora_targets
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
from transformers import {{ auto_class }}, TorchAoConfig

targets = lora_targets({{ auto_class }}.from_pretrained("{{ model_id }}"))
names = [f"{name}.weight" for name in targets["target_modules"]] + targets["target_parameters"]
config = TorchAoConfig(FqnToConfig(dict.fromkeys(names, Int8WeightOnlyConfig(version=2))))
model = {{ auto_class }}.from_pretrained("{{ model_id }}", quantization_config=config)
```
{%- elif bits -%}
**torchao**: the experts are in few bits already; its recipes are for the layers around them.
{%- else -%}
**torchao** has no recipe for experts that are stored as low rank + sparse.
{%- endif %}
{% endif %}{% if methods %}
## Method

| step | method | paper |
|---|---|---|
{% for step, method, paper in methods -%}
| {{ step }} | {{ method }} | {{ paper }} |
{% endfor %}
Calibrated on {{ "{:,}".format(tokens) }} tokens{% if data %} of {{ data }}{% endif %}. Options and groups in full:
`mcsmoe_plan.json`. Made with {{ versions }}.
{% endif %}{% if size %}
## Size

{{ size | join("\n") }}
{% endif %}{% if layers %}
## Experts per layer

{{ layers }}
{% if whole %}
Left whole: {{ whole | join(", ") }}.
{% endif %}{% endif %}
{% for step in steps -%}
## {{ step.title }}

{{ step.lines | join("\n") }}

{% endfor -%}
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
{{ marks[1] }}
""",
    keep_trailing_newline=True,
)


def render(record: Record) -> str:
    """Return the card of a record: metadata for the Hub, then one marked section with all the rest.

    The name to load it by and the bytes on disk of the last stage are left open, for saving to fill in.
    """
    base, plan = record.base, record.plan
    layers = record.layers or planned_layers(plan)
    tokens, done = plan.get("tokens", {}), done_to(layers)
    quality = record.quality.get(record.judged)
    text = TEMPLATE.render(
        marks=SECTION,
        title=f"{base.name.rpartition('/')[2] or base.model_type} " + title_of(layers, done),
        done=done,
        bits=bits_of(layers),
        layers_of=partial(layers_of, layers),
        base=f"[{base.name}](https://huggingface.co/{base.name})"
        if "/" in base.name
        else f"A model of type `{base.model_type}`",
        version=f" {plan['versions']['hf_mcsmoe']}" if plan else "",
        quality=_markdown(quality_rows(record.quality)) if record.quality else "",
        held_out=_held_out(record),
        check=_check(record.judging),
        data=", ".join(f"`{name}`" for name in record.calibration.data),
        versions=", ".join(f"{package} {number}" for package, number in plan.get("versions", {}).items()),
        costs=_cost_table(record),
        writes=record.auto_class in WRITERS,
        dense=(record.is_plain or all(step.title != LOW_RANK for step in record.steps)) and not bits_of(layers),
        auto_class=record.auto_class,
        plain=record.is_plain,
        engine=record.engine,
        constants=in_place_of(layers),
        trust="" if record.is_plain else ", trust_remote_code=True",
        argument="" if record.is_plain else ",trust_remote_code=True",
        model_id=MODEL_ID,
        methods=method_steps(plan["config"]) if plan else [],
        tokens=max(tokens.values(), default=0),
        layers=_layer_table(layers),
        size=size_lines(record.size, quality.kl if quality else None) if record.size else [],
        whole=[f"`{name}`" for name in tokens if name not in layers],
        steps=record.steps,
    )
    return f"---\n{_metadata(record).to_yaml()}\n---\n\n{text}"


def renew_metadata(card: Path, old: Record, new: Record, model_id: str) -> None:
    """Let the metadata of a card tell of the model as it is now: what was generated of it before gives way.

    What a person wrote there stays. A card that is not there, or that nobody can read, is left.
    """
    try:
        written = metadata_load(card) if card.is_file() else None
    except (OSError, ValueError, YAMLError):
        return
    if written is None:
        return
    before, now = (_metadata(record).to_dict() for record in (old, new))
    results = json.loads(json.dumps(now.pop("model-index", [])).replace(MODEL_ID, model_id))
    own_tags = [tag for tag in written.get("tags") or [] if tag not in before["tags"]]
    kept = {key: value for key, value in written.items() if before.get(key) != value and key != "model-index"}
    metadata = {**now, **kept, "tags": [*now["tags"], *own_tags]}
    metadata_save(card, metadata | ({"model-index": results} if results else {}))


def planned_layers(plan: Mapping[str, Any]) -> dict[str, Stored]:
    """Return what a plan says of its layers."""
    return {
        name: Stored.of({"num_experts": len(layer.get("expert_map", ())), **layer})
        for name, layer in plan.get("layers", {}).items()
    }


def _layer_table(layers: Mapping[str, Stored]) -> str:
    if not layers:
        return ""
    head, *rows = layer_rows(layers)
    return _markdown([head, *([f"`{name}`", *others] for name, *others in rows)])


def _cost_table(record: Record) -> str:
    if not record.costs:
        return ""
    head, *rows = cost_rows(record.costs)
    for row in rows:
        if row[0] == "bytes on disk":
            row[-2:] = [BYTES_ON_DISK, SAVED]
    return _markdown([head, *rows])


def _held_out(record: Record) -> str:
    """Return which rows were held out, as part of a sentence."""
    data = record.judging
    if not data.held_out:
        return "rows"
    if record.judged_on is None:
        return f"{data.held_out:,} of the {data.rows:,} calibration rows"
    return f"{data.held_out:,} of {data.rows:,} rows{' of ' if data.data else ''}{', '.join(data.data)}"


def _check(data: Calibration) -> str:
    """Return which text of another kind judged, as part of a sentence; empty where none did."""
    names = f" of {', '.join(data.check)}" if data.check else ""
    return f"{data.check_rows:,} rows{names}" if data.check_rows else ""


def _markdown(rows: list[list[str]]) -> str:
    """Return a table, its head first, whose figures are on the right."""
    head, *rows = rows
    columns = "|---|" + "---:|" * (len(head) - 1)
    head_line, *lines = (f"| {' | '.join(row)} |" for row in (head, *rows))
    return "\n".join([head_line, columns, *lines])


def _metadata(record: Record) -> ModelCardData:
    names = [*record.calibration.data, *(record.judged_on.data if record.judged_on else [])]
    sets = list(dict.fromkeys(name.partition(":")[0] for name in names if "/" in name))
    results, own_code = _results(record), [] if record.is_plain else ["custom_code"]
    return ModelCardData(
        model_name=MODEL_ID if results else None,
        eval_results=results or None,
        datasets=sets or None,
        language=record.base.language or None,
        base_model=record.base.name if "/" in record.base.name else None,
        **record.base.licence,
        library_name=record.engine or "transformers",
        pipeline_tag=PIPELINES.get(record.auto_class),
        tags=["mcsmoe", "mixture-of-experts", "model-compression", *own_code, "arxiv:2310.01334"],
    )


def _results(record: Record) -> list[EvalResult]:
    """Return what was measured of the model as it is now, where it is known on what."""
    quality, data = record.quality.get(record.judged), record.judging
    if quality is None:
        return []
    held_out = "held-out calibration rows of " if record.judged_on is None else "held-out rows of "
    texts = [(METRICS, data.data, held_out), (CHECK_METRICS, data.check, "")]
    return [
        _result(record, names, f"{told}{', '.join(names)}", metrics[name], value)
        for metrics, names, told in texts
        for name, value in vars(quality).items()
        if names and name in metrics and value is not None
    ]


def _result(record: Record, data: list[str], told: str, metric: tuple[str, str], value: float) -> EvalResult:
    (kind, title), task = metric, PIPELINES.get(record.auto_class) or "text2text-generation"
    return EvalResult(task, data[0], told, kind, value, metric_name=title)


def method_steps(config: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return step, method and link to the method's paper, a row each, of a plan's options."""
    steps = []
    for stage, registry in REGISTRIES.items():
        if (name := config.get(stage)) is None:
            continue
        method = registry.methods.get(name)
        paper = f"[arXiv {method.paper}](https://arxiv.org/abs/{method.paper})" if method and method.paper else ""
        steps.append((stage, name, paper))
    kept = f"{config['experts']} per layer" if isinstance(config["experts"], int) else f"{config['experts']:.0%}"
    return [("experts kept", kept, ""), *steps, ("aligned to", config["reference"], "")]
