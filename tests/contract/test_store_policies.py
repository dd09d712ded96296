"""Policies that were put in force, and tokens that may outlive one."""

from dataclasses import replace

import pytest

from broker.errors import Conflict
from broker.server.store.policy_ports import PolicyRow, PolicySource
from broker.server.store.ports import Store
from broker.server.store.tables.policies import KEPT
from tests.unit.server.store.samples import HOUR, NOW, SECOND, task, token

FIRST = PolicyRow(1, "sha-256:a", "permit…", PolicySource.BUILT_IN, "server", NOW)


class TestPolicies:
    async def test_the_highest_version_is_in_force_and_older_ones_are_found_by_their_hash(self, store: Store) -> None:
        assert await store.read(lambda r: (r.policy(), r.policy("sha-256:a"))) == (None, None)
        second = replace(FIRST, version=2, hash="sha-256:b", source=PolicySource.PUSHED, put_by="operator:uid:0")
        again = replace(FIRST, version=3, put_at=NOW + SECOND)
        for row in (FIRST, second, again):
            await store.write(lambda w, row=row: w.put_policy(row))
            assert await store.read(lambda r: r.policy()) == row
        assert await store.read(lambda r: (r.policy("sha-256:b"), r.policy("sha-256:a"))) == (second, again)

    async def test_a_version_is_taken_once_and_upwards(self, store: Store) -> None:
        await store.write(lambda w: w.put_policy(replace(FIRST, version=2)))
        for version in (1, 2):
            with pytest.raises(Conflict) as conflict:
                await store.write(lambda w, version=version: w.put_policy(replace(FIRST, version=version)))
            assert conflict.value.reason == "stale_version"

    async def test_some_are_kept(self, store: Store) -> None:
        for version in range(1, KEPT + 3):
            row = replace(FIRST, version=version, hash=f"h{version}")
            await store.write(lambda w, row=row: w.put_policy(row))
        assert await store.read(lambda r: [r.policy(f"h{n}") is None for n in (1, 2, 3, KEPT + 2)]) == [
            True, True, False, False,
        ]  # fmt: skip


class TestLivingTokens:
    async def test_expired_and_revoked_ones_are_left_out(self, store: Store) -> None:
        made = [token(f"jti_{n}", expires_at=NOW + HOUR) for n in range(4)]
        expired = token("jti_9", expires_at=NOW)
        await store.write(lambda w: (w.add_task(task()), *(w.add_token(one) for one in (*made, expired))))
        await store.write(lambda w: w.revoke_token("jti_1", NOW))

        def living(**asked):
            return store.read(lambda r: [one.jti for one in r.living_tokens("tsk_1", NOW, **asked)])

        assert await living(limit=10) == ["jti_0", "jti_2", "jti_3"]
        assert await living(limit=2) == ["jti_0", "jti_2"]
        assert await living(after="jti_2", limit=10) == ["jti_3"]
        assert await store.read(lambda r: r.living_tokens("no", NOW, limit=10)) == ()
