"""Rollouts in checkpoints are restored, those of earlier versions as well."""

import numpy as np
import pytest

from oumi_pl.data.rollout_loader import Group, _from_plain, _to_plain
from oumi_pl.rollouts.sampling import Completion


@pytest.mark.parametrize("missing", [(), ("replies",), ("policy_logps",), ("replies", "policy_logps")])
def test_rollouts_of_a_checkpoint_are_restored_also_without_what_earlier_versions_lack(missing):
    ids, logps = np.arange(4, dtype=np.int32), -np.ones(3, dtype=np.float32)
    whole = Completion(ids, logps, -logps, True, ((1, 2),), 2 * logps)
    group = Group(5, [whole, whole._replace(policy_logps=None)], np.ones((2, 1)), np.zeros(2), extra=1)
    plain = _to_plain(group)
    restored = _from_plain({name: value for name, value in plain.items() if name not in missing})
    for ours, theirs in zip(restored.completions, group.completions, strict=True):
        assert ours.replies == (() if "replies" in missing else theirs.replies)
        recomputed = None if "policy_logps" in missing else theirs.policy_logps
        assert (ours.policy_logps is None) == (recomputed is None)
        assert recomputed is None or np.array_equal(ours.policy_logps, recomputed)
        assert np.array_equal(ours.ids, theirs.ids)
        assert np.array_equal(ours.logps, theirs.logps)
    assert (restored.prompt, restored.extra) == (group.prompt, group.extra)
