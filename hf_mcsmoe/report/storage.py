"""What the layers of one result are stored as, and what that was expected to cost."""

from markupsafe import Markup

from hf_mcsmoe.report.charts import Point, bars, paired_bars, scatter
from hf_mcsmoe.report.pictures import Picture
from hf_mcsmoe.report.result import Result
from hf_mcsmoe.report.words import figure, short_names, size
from hf_mcsmoe.tables import layer_rows


def storage(result: Result) -> Picture:
    """Return the experts of each layer, and the bits of their weights where these are few."""
    title, layers = "What each layer is stored as", result.layers
    labels = short_names([layer.name for layer in layers])
    counts = [(float(len(layer.expert_map)), float(len(layer.groups))) for layer in layers]
    drawings = [(paired_bars("Experts of each layer, before and after", labels, counts, figure), "")]
    told = {layer.name: layer.stored for layer in layers if layer.stored}
    caption = "Experts before and after"
    if any(item.bits for item in told.values()):
        caption += ", and below them the bits of a weight, the mean over the matrices of a layer"
        bits = [layer.bits or 0.0 for layer in layers]
        drawings.append((bars("Bits of the weights of each layer", labels, bits, figure), ""))
    if any(item.rank for item in told.values()):
        caption += "; the ranks are in the table"
    return Picture(title, f"{caption}.", drawings, layer_rows(told) if told else ())


def expected(result: Result) -> Picture | None:
    """Return what the choice for a size was expected to cost, by layer; None where no size was asked for."""
    choice = result.record.size if result.record else None
    if choice is None:
        return None
    title = "Predicted and measured divergence"
    if not choice.predicted:
        return Picture(title, f"For {choice.asked:,} bytes {choice.method} was taken; nothing was predicted.")
    measured = result.quality.get("kl")
    return Picture(
        title,
        f"For {choice.asked:,} bytes {choice.method} was taken. Predicted KL to the original "
        f"{figure(choice.predicted_kl)}, measured on rows held out {figure(measured)}; what each layer adds to the "
        "prediction is drawn.",
        [(_by_layer(choice.predicted), "")],
        [
            ["layer", "predicted KL"],
            *([name, figure(value)] for name, value in choice.predicted.items()),
            ["predicted, all layers", figure(choice.predicted_kl)],
            ["measured", figure(measured)],
            *([f"on these rows: {name}", figure(value)] for name, value in choice.checked.items()),
        ],
    )


def ladder(result: Result) -> Picture | None:
    """Return what other sizes and methods were expected to cost; None where nothing was predicted."""
    choice = result.record.size if result.record else None
    rungs = [rung for rung in choice.ladder if rung.kl > 0] if choice else []
    if choice is None or not rungs:
        return None
    points = [Point(float(rung.bytes), rung.kl, str(place)) for place, rung in enumerate(rungs, 1)]
    image = scatter(
        "Predicted KL against bytes", points, (size, figure), ("size on disk", "predicted KL"), in_decades=True
    )
    return Picture(
        "Divergence at other sizes",
        "What was expected at other sizes of what would be chosen, and of single methods in all layers; the line "
        "joins those that no other beats in both. Each step of the upper axis is a power of ten.",
        [(image, "")],
        [
            ["", "method", "size on disk", "predicted KL"],
            *([str(place), rung.method, size(rung.bytes), figure(rung.kl)] for place, rung in enumerate(rungs, 1)),
        ],
    )


def _by_layer(predicted: dict[str, float]) -> Markup:
    return bars("Predicted KL of each layer", short_names([*predicted]), [*predicted.values()], figure)
