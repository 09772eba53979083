"""Plugins whose modules ask for a GPU while they are imported."""

from tests.suites.imports_cuda import AtImport
from tests.suites.imports_library import Innocent
from tests.suites.mistakes import Mistake, suite_of
from tests.suites.wrong_vaes import GPU

from latentmill.testing import VAESuite


class InheritsIt(AtImport):
    """The parent's module does."""


def vae(what, plugin, says):
    return Mistake(what, suite_of(VAESuite, plugin), {GPU}, says)


CALLS = "the import of tests.suites.imports_cuda calls torch.cuda.is_available before load(device)"
MISTAKES = [
    vae("asks for a GPU while its module is imported", AtImport, CALLS),
    vae("asks for a GPU while its parent's module is imported", InheritsIt, CALLS),
]

RIGHT = [suite_of(VAESuite, Innocent)]
