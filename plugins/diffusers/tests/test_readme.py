"""The README's table of families is what the table in the code and the tiny models say."""

from pathlib import Path

import tiny

from latentmill_diffusers.families import FAMILIES
from latentmill_diffusers.folder import Folder
from latentmill_diffusers.scheduler import solver_of

README = Path(__file__).parents[1] / "README.md"
HEAD = "| family | pipeline in model_index.json | network | VAE | text encoders | tested with | to know |"


def table(model):
    lines = [HEAD, "|---" * 7 + "|"]
    for pipeline, family in FAMILIES.items():
        index = Folder(str(model(pipeline))).index
        texts = [index[name][1] for name in sorted(index) if name.startswith("text_encoder") and index[name][0]]
        scheduler = index["scheduler"][1]
        solver = solver_of(Folder(str(model(pipeline))))
        tested = f"{scheduler} = {solver}" if solver else f"{scheduler}, traced"
        cells = (
            family.name,
            f"`{pipeline}`",
            index[family.network][1],
            index["vae"][1],
            ", ".join(texts),
            tested,
            family.note,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def test_every_family_has_a_tiny_model():
    assert FAMILIES.keys() == tiny.BUILDERS.keys()


def test_the_table_is_up_to_date(model):
    wanted = table(model)
    assert wanted in README.read_text(), f"README.md's table is stale; it should be\n\n{wanted}\n"
