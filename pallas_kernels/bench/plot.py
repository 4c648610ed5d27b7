"""A picture of one layer's attention, sparse and dense, over the length of the prompt."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

_PAPER, _INK, _FAINT = "#292929", "#c5c8c6", "#8a8a8a"  # As in docs/demo.svg: readable on a page of any colour.
_COLOURS = {"dense": "#d0b344", "clustered": "#68a0b3", "uniform": "#98a84b"}


def problem(file: Path) -> str | None:
    """The reason why nothing can be drawn to `file`, or None."""
    if file.suffix not in (".svg", ".png"):
        return f"--plot is {str(file)!r}; it must end in .svg or .png"
    if not importlib.util.find_spec("matplotlib"):
        return "--plot needs matplotlib: pip install 'keye-jax[bench]', or draw elsewhere with --from FILE.json"
    return None


def draw(result: dict[str, Any], file: Path) -> None:
    """Draws the layers of a result of `python -m pallas_kernels.bench`: milliseconds over tokens."""
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    lines: dict[str, list[tuple[int, float]]] = {name: [] for name in _COLOURS}
    labels = {"clustered": "sparse, clustered selections (of dense)", "uniform": "sparse, uniform selections"}
    ratios = []
    for layer in result["layers"]:
        if "dsa_seconds" in layer:
            lines[layer["selections"]].append((layer["tokens"], layer["dsa_seconds"]))
        if "dense_seconds" in layer and layer["selections"] == "clustered":
            labels["dense"] = f"dense ({layer['dense']})"
            lines["dense"].append((layer["tokens"], layer["dense_seconds"]))
        if "ratio" in layer and layer["selections"] == "clustered":
            ratios.append((layer["tokens"], layer["dsa_seconds"], layer["ratio"]))

    style: dict[Any, Any] = {
        "font.family": "sans-serif",
        "font.size": 11,
        "svg.fonttype": "none",
        "svg.hashsalt": "bench",
    }
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), _INK)
    style |= {"axes.edgecolor": _FAINT, "axes.facecolor": _PAPER, "figure.facecolor": _PAPER}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(7.2, 4.2), layout="constrained")
        for name, points in lines.items():
            if points:
                tokens, seconds = zip(*points, strict=True)
                milliseconds = [x * 1e3 for x in seconds]
                axes.plot(tokens, milliseconds, marker="o", linewidth=2, color=_COLOURS[name], label=labels[name])
        for tokens, seconds, ratio in ratios:
            beside, side = ((-2, 6), "right") if ratio > 1 else ((2, -14), "left")
            axes.annotate(
                f"{ratio:.2f}",
                (tokens, seconds * 1e3),
                beside,
                textcoords="offset points",
                ha=side,
                color=_COLOURS["clustered"],
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({layer["tokens"] for layer in result["layers"]})
        axes.set_xticks(ticks, [f"{tick // 1024}K" for tick in ticks], minor=False)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.margins(x=0.08)
        axes.set_xlabel("tokens")
        axes.set_ylabel("ms")
        axes.set_title(f"Attention of one layer, {result['device']}")
        axes.grid(color=_FAINT, alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        metadata = {"Date": None} if file.suffix == ".svg" else None
        figure.savefig(file, dpi=160, metadata=metadata)
        pyplot.close(figure)
