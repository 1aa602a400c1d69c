"""Settings: secrets, and rules between fields. Oracle: hand-written addresses and settings."""

from __future__ import annotations

from typing import Any

import pytest

from hero.checks import check, from_dict
from hero.config import TrainConfig, redacted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://localhost:8000/v1", "http://localhost:8000/v1"),
        ("https://me:s3cret@host/v1", "https://***@host/v1"),
        ("https://host/v1?api_key=abc&x=1", "https://host/v1?api_key=***&x=1"),
        ("https://host/v1?x=1&token=abc", "https://host/v1?x=1&token=***"),
        ("https://host/v1?api-key=abc", "https://host/v1?api-key=***"),
        ("https://host?subscription-key=abc#x", "https://host?subscription-key=***#x"),
        ("https://host?sv=1&SIG=abc%2F", "https://host?sv=1&SIG=***"),
        ("https://me:p@ss@host/v1", "https://***@host/v1"),
        ("https://me:pa/ss@host/v1", "https://***@host/v1"),
        ("http://host:80/a@b and x@y", "http://host:80/a@b and x@y"),
        ("wss://host?jwt=abc&pass=d", "wss://host?jwt=***&pass=***"),
        ("got Authorization: Bearer abc.def-123", "got Authorization: ***"),
        ("{'x-api-key': 'abc', 'n': 1}", "{'x-api-key': '***', 'n': 1}"),
        ("no bearer abcdef0123456789 here", "no bearer *** here"),
        ("the key sk-abcdefghij0123456789 is wrong", "the key *** is wrong"),
        ("a basic understanding; OPENAI_API_KEY", "a basic understanding; OPENAI_API_KEY"),
        ("the password: swordfish, said the door", "the password: swordfish, said the door"),
        ("mail me@host.com about http://host/", "mail me@host.com about http://host/"),
    ],
)
def test_addresses_lose_their_secrets(text: str, shown: str) -> None:
    assert redacted(text) == shown


@pytest.mark.parametrize(
    "name",
    ["apiKey", "api-key", "hf_token", "accessToken", "passwd", "auth", "credentials", "pwd",
     "api_keys", "jwt", "passphrase"],
)  # fmt: skip
@pytest.mark.parametrize("value", ["abc", 1234, 0.5, ["abc", "def"]])
def test_names_of_secrets(name: str, value: Any) -> None:
    """Options are read as YAML, so a password of digits is a number."""
    shown = {name: "***", f"{name}_file": value}
    assert redacted({name: value, f"{name}_file": value}) == shown
    assert redacted({"options": [{name: value}]}) == {"options": [{name: "***"}]}
    assert redacted({name: True}) == {name: True}


def test_a_key_in_the_place_of_its_variable_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig()
    config.reflection.api_key_env = "9f86d081884c7d65"
    with pytest.raises(ValueError, match="got 16 characters that are none") as said:
        check(config)
    assert "9f86" not in str(said.value)
    monkeypatch.setenv("my_key", "abc")
    config.reflection.api_key_env = "my_key"
    check(config)


def test_settings_lose_their_secrets_and_nothing_else() -> None:
    config = TrainConfig()
    config.reflection.base_url = "https://me:s3cret@host/v1"
    config.env.options = {"api_key": "abc", "profile": "tiny", "password": ""}
    data = redacted(config)
    assert data["reflection"]["base_url"] == "https://***@host/v1"
    assert data["env"]["options"] == {"api_key": "***", "profile": "tiny", "password": ""}
    assert data["reflection"]["api_key_env"] == "OPENAI_API_KEY"
    data["env"], data["reflection"] = {}, {}
    assert from_dict(data) == from_dict({"env": {}, "reflection": {}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "hero+grpo"}, "rollout.group_size must be at least 2, got 1"),
        ({"optim": {"minibatches": 33}}, "minibatches=33 must be at most the 32 episodes"),
        ({"reflection": {"reflector": "openai"}}, "needs --reflection.base-url and"),
        (
            {"reflection": {"reflector": "openai", "model": "m", "base_url": "http://***@h"}},
            "reflection.base_url was saved without its secret, got 'http://***@h'",
        ),
        ({"env": {"options": {"key": "***"}}}, "env.options key was saved without its secret"),
        ({"resume": "nowhere"}, "the folder of a run, got 'nowhere'"),
    ],
)
def test_settings_that_do_not_fit_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        check(from_dict(settings))
    assert message in str(refused.value)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ValueError) as refused:
        from_dict({"updates": 0, "loss": {"beta": 2}, "rollout": {"epsilon": 1}})
    assert str(refused.value).splitlines()[1:] == [
        "  rollout.epsilon: unknown field; here it is loss.clip_low",
        "  loss.beta must be in (0, 1), got 2: JSD tends to 0 at both ends; for the KL divergences "
        "set --loss.divergence forward_kl or reverse_kl",
        "  updates must be greater than 0, got 0",
    ]
