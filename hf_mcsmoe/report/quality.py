"""Size against quality: of the stages of one result, and of several results against each other."""

from collections.abc import Sequence

from hf_mcsmoe.report.charts import Point, bars, scatter
from hf_mcsmoe.report.pictures import Picture
from hf_mcsmoe.report.result import Result
from hf_mcsmoe.report.words import figure, share, size

# Measures that a record may hold, the first of them that all results have is drawn.
MEASURES = {"kl": "KL to the original (nats)", "loss": "loss (nats)"}


def summary(result: Result) -> list[tuple[str, str, str]]:
    """Return figures of one result: what they are, the figure, and a note."""
    (before, after), layers = result.experts, result.layers
    held = sum(layer.bytes_before for layer in layers), sum(layer.bytes_after for layer in layers)
    merged = sum(layer.is_merged for layer in layers)
    found = [
        ("experts", f"{after:,}", f"of {before:,}, in {len(layers)} layers, {merged} of them merged"),
        ("bytes of experts", size(held[1]), f"{share(held[1], held[0])} of {size(held[0])}"),
    ]
    if result.bytes_after is not None:
        old = result.bytes_before
        note = f"{share(result.bytes_after, old)} of {size(old)}" if old else "of safetensors"
        found.insert(0, ("size on disk", size(result.bytes_after), note))
    choice = result.record.size if result.record else None
    for name, words in MEASURES.items():
        if name in result.quality:
            predicted = choice.predicted_kl if choice and name == "kl" else None
            note = "on rows held out" if predicted is None else f"on rows held out; predicted {figure(predicted)}"
            found.append((words, figure(result.quality[name]), note))
    return found


def stages(result: Result) -> Picture:
    """Return the measures of each stage of the compression of one result."""
    title = "What each stage cost in quality"
    measure = next((name for name in MEASURES if any(values.get(name) for values in result.stages.values())), None)
    if measure is None:
        return Picture(title, "The record tells no loss or divergence on rows held out.")
    found = {stage: values.get(measure) for stage, values in result.stages.items()}
    known = {stage: value for stage, value in found.items() if value is not None}
    image = bars(f"{MEASURES[measure]}, by stage", [*known], [*known.values()], figure)
    rows = [[stage, *(figure(values.get(name)) for name in MEASURES)] for stage, values in result.stages.items()]
    now = f" The model as it is now is in the stage {result.judged}." if result.judged else ""
    caption = f"By {MEASURES[measure]}, on rows held out.{now}"
    return Picture(title, caption, [(image, "")], [["stage", *MEASURES.values()], *rows])


def compared(results: Sequence[Result]) -> Picture:
    """Return several results in one picture, numbered in the order in which they are named."""
    title, numbered = "Size against quality", [*enumerate(results, start=1)]
    table = [["", "result", "made of", "size on disk", "experts", *MEASURES.values()]]
    table += [_row(place, result) for place, result in numbered]
    sized = [(place, result) for place, result in numbered if result.bytes_after is not None]
    measure = next((name for name in MEASURES if any(name in result.quality for _, result in sized)), None)
    if measure is None:
        caption = "No record tells the loss or the divergence of its model on rows held out, so only sizes are told."
        return Picture(title, caption, table=table)
    points = [
        Point(float(result.bytes_after or 0), result.quality[measure], str(place))
        for place, result in sized
        if measure in result.quality
    ]
    lacking = [result.name for place, result in numbered if str(place) not in {point.name for point in points}]
    caption = "The line joins the results that no other beats in both."
    caption += f" Not measured: {', '.join(lacking)}." if lacking else ""
    caption += " They were made of different models." if len({result.base for result in results}) > 1 else ""
    image = scatter(title, points, (size, figure), ("size on disk", MEASURES[measure]))
    return Picture(title, caption, [(image, "")], table)


def _row(place: int, result: Result) -> list[str]:
    held = "-" if result.bytes_after is None else size(result.bytes_after)
    before, after = result.experts
    measures = (figure(result.quality.get(name)) for name in MEASURES)
    return [str(place), result.name, result.base, held, f"{after:,} of {before:,}", *measures]
