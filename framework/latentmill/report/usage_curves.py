"""Curves of what workers used over a run, as SVG in the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html import escape
from string import Template

from latentmill.progress import bytes_text, duration_text
from latentmill.usage import GroupUsage, History

WIDTH, HEIGHT = 480, 100
CURVE = Template(
    '<figure><svg viewBox="0 0 480 100" preserveAspectRatio="none" role="img" aria-label="$title">'
    '<polyline points="$points"/></svg><figcaption>$title: $about</figcaption></figure>'
)


def figures(history: History) -> Iterator[str]:
    """For each group of workers its cores, its memory, and its GPUs as far as somebody can say: a curve each."""
    kinds: list[tuple[str, Callable[[GroupUsage], float | None], Callable[[float], str]]] = [
        ("cores busy", lambda group: group.cpu, lambda value: f"{value:.1f}"),
        ("memory", lambda group: group.memory, bytes_text),
        ("GPUs busy", lambda group: group.gpu, lambda value: f"{value:.0%}"),
        ("GPU memory", lambda group: group.gpu_memory, bytes_text),
    ]
    for stages, moments in list(history.kept.items()):
        for what, of, text in kinds:
            found = [(seconds, value) for seconds, group in tuple(moments) if (value := of(group)) is not None]
            if len(found) > 1:
                yield _curve(f"{stages}: {what}", found, text, whole=1.0 if what == "GPUs busy" else 0.0)


def _curve(title: str, found: list[tuple[float, float]], text: Callable[[float], str], whole: float) -> str:
    """``whole``: what the top stands for at least."""
    first, last, most = found[0][0], found[-1][0], max(value for _, value in found)
    top = max(most, whole) or 1.0
    points = (
        f"{WIDTH * (seconds - first) / ((last - first) or 1.0):.1f},{HEIGHT - (HEIGHT - 2) * value / top:.1f}"
        for seconds, value in found
    )
    mean = sum(value for _, value in found) / len(found)
    about = f"{text(mean)} in the mean, {text(most)} at most, over {duration_text(last - first)}"
    return CURVE.substitute(title=escape(title), points=" ".join(points), about=about)
