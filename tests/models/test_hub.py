"""An unreachable hub is asked once; afterwards libraries use their caches only, for a while."""

from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from oumi_pl.models.hub import asked_once


@pytest.mark.parametrize("reachable", [True, False])
def test_an_unreachable_hub_is_asked_once(monkeypatch, reachable):
    asked, own = [], SimpleNamespace(HF_HUB_OFFLINE=False)

    def head(url, timeout):
        asked.append(url)
        if not reachable:
            raise OSError("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: SimpleNamespace(head=head))
    with asked_once(own):
        assert constants.is_offline_mode() is own.HF_HUB_OFFLINE is not reachable
    assert asked == [constants.ENDPOINT]
    assert constants.is_offline_mode() is own.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(("hub", "own"), [(True, True), (True, False), (False, True)])
def test_the_hub_is_not_asked_in_offline_mode(monkeypatch, hub, own):
    """As by HF_DATASETS_OFFLINE, which says it to one library alone."""
    library = SimpleNamespace(HF_HUB_OFFLINE=own)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", hub)
    monkeypatch.setattr("huggingface_hub.utils.get_session", None)
    for _ in range(2):
        with asked_once(library):
            assert (constants.is_offline_mode(), library.HF_HUB_OFFLINE) == (hub, own)
        assert (constants.is_offline_mode(), library.HF_HUB_OFFLINE) == (hub, own)
