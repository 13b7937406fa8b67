"""A subclass may use any name that is not documented as ours: nothing private of our classes is hit by accident."""

import inspect
import re

import pytest

from oumi_pl.data.dpo import DPOData
from oumi_pl.data.kto import KTOData
from oumi_pl.data.packed_chat import PackedChatData
from oumi_pl.data.pretrain import PretrainData
from oumi_pl.data.sft import SFTData
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.modules.dpo import DPO
from oumi_pl.modules.kto import KTO
from oumi_pl.modules.pretrain import Pretrain
from oumi_pl.modules.sft import SFT
from tests.tiny import LLAMA, data, distance, fit, module, sgd

CLASSES = [SFT, DPO, KTO, Pretrain, SFTData, DPOData, KTOData, PretrainData, PackedChatData]


def own_names(cls):
    """Names that our classes define or assign to `self`, as they are in the class or the instance."""
    for base in cls.__mro__:
        if base.__module__.startswith("oumi_pl."):
            assigned = re.findall(r"\bself\.(\w+)(?::[^=]+)? = ", inspect.getsource(base))
            mangled = (f"_{base.__name__}{n}" if n.startswith("__") and not n.endswith("__") else n for n in assigned)
            yield from {*vars(base), *mangled}


@pytest.mark.parametrize("cls", CLASSES)
def test_private_names_carry_the_name_of_their_class(cls):
    ours = {base.__name__ for base in cls.__mro__ if base.__module__.startswith("oumi_pl.")}
    private = {name for name in own_names(cls) if name.startswith("_") and not name.startswith("__")}
    # abc's and Lightning's own, which they set on the class
    private -= {"_abc_impl"}
    assert [name for name in sorted(private) if not name.startswith(tuple(f"_{own}__" for own in ours))] == []


class WithNamesOfItsOwn(SFT):
    """Uses the names that came to mind, some of which were once ours."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._update = self._scale = self._expected = self._evaluated = "mine"

    def _sums(self):
        return "mine"

    def _grad_norm(self):
        return "mine"

    def __over_ranks(self):
        return "mine"

    def __counts(self, *_):
        return "mine"


class DataWithNamesOfItsOwn(SFTData):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._position = self._stores = self._train_loader = self._fetching = "mine"

    def __split_report(self, split):
        return "mine"


def test_a_subclass_with_such_names_trains_as_before(tmp_path):
    settings = {"tokenizer": ByteTokenizer(), "max_length": 256, "seed": 0, "batch_size": 4}
    expected = fit(module(), data(tmp_path, validation=0.3, **settings), max_epochs=1)
    rows = data(tmp_path).sources["train"]
    got = fit(
        WithNamesOfItsOwn(config=LLAMA, optimizer=sgd), DataWithNamesOfItsOwn(rows, 0.3, **settings), max_epochs=1
    )
    assert distance(got, expected) == 0
