"""`hf-mcsmoe inspect`."""

from typing import Annotated

import typer

from hf_mcsmoe.attached import record_of, stored_layers
from hf_mcsmoe.cli.display import console, layer_table, layers_table, stage_bars
from hf_mcsmoe.cli.options import Dequantize, Model, Selection, options_of
from hf_mcsmoe.cli.specialisation import FIELDS, STABLE_RANK, Specialising, show_measured
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.finite import check_weights
from hf_mcsmoe.layers.loading import empty_model
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.modeling.configuration_mcsmoe import family_of
from hf_mcsmoe.planning import check_request, saved_parameters
from hf_mcsmoe.progress import one_step


@options_of(Selection, "selection", panel="Merge")
@options_of(Specialising, "text", FIELDS, panel="Data")
def inspect_command(
    model: Model,
    selection: Selection,
    text: Specialising,
    check: Annotated[
        bool, typer.Option(help="also read all weights of a folder, for NaN", rich_help_panel="Loading")
    ] = False,
    dequantize: Dequantize = False,
    stable_rank: Annotated[bool, typer.Option(help=STABLE_RANK, rich_help_panel="Loading")] = False,
) -> None:
    """Show a model's layers of experts and what merging them would save. Loads no weights unless asked to."""
    config = selection.apply(MergeConfig())
    empty = empty_model(model, dequantize=dequantize)
    layers = Layers.of(empty)
    merged = layers.compressed
    kind = family_of(type(empty.config))[0]
    console.print(f"[bold]{type(empty).__name__}[/], family {kind}" + (", merged" if merged else ""))
    console.print(layer_table(layers))
    if merged:
        console.print(layers_table(stored_layers(empty, record_of(empty).plan)))
    if check:
        with stage_bars() as progress, one_step("checking", progress):
            check_weights(model)
        console.print("all weights are finite")
    if text.data or stable_rank:
        show_measured(model, text, dequantize=dequantize, stable_rank=stable_rank)
    total, held = empty.num_parameters(), sum(tied[0].num_parameters for tied in layers.tied)
    console.print(f"parameters {total:,}, of them in experts {held:,} ({held / total:.1%})")
    if merged:
        return
    check_request(layers, config)
    after = total - saved_parameters(layers, config)
    console.print(
        f"with --experts {selection.experts}: parameters {after:,} ({1 - after / total:.1%} fewer), "
        f"{after * empty.dtype.itemsize / 1e9:,.2f} GB in {str(empty.dtype).removeprefix('torch.')}"
    )
