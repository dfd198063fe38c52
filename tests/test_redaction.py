"""No secret stands in what is kept, printed or reported."""

from __future__ import annotations

import pytest

from gradsift.cli import app
from gradsift.data.remote import fetched
from gradsift.errors import UserError
from gradsift.redaction import readable_command, redacted

SIGNED = "https://host/pool.jsonl?X-Amz-Signature=s3cret&v=s3cret;k=s3cret#part"


@pytest.mark.parametrize(
    "argv, shown",
    [
        (
            ["/usr/bin/gradsift", "select", "less", "--pool", "a b.jsonl"],
            "gradsift select less --pool 'a b.jsonl'",
        ),
        (["x/__main__.py", "demo"], "gradsift demo"),
        (
            ["gradsift", "--hub-token", "s3cret", "--budget", "10M-tokens"],
            "gradsift --hub-token '***' --budget 10M-tokens",
        ),
        (
            ["gradsift", "--api-key=s3cret", "--token-budget", "1024"],
            "gradsift '--api-key=***' --token-budget 1024",
        ),
        (["gradsift", "-o", "x=hf_s3cretdefghijklmnop"], "gradsift -o 'x=***'"),
        ("gradsift select 'a b'", "gradsift select 'a b'"),
        (["gradsift", "--out", "https://me:s3cret@host/x"], "gradsift --out 'https://***@host/x'"),
        (["gradsift", "--out", "https://s3cret@host/x"], "gradsift --out 'https://***@host/x'"),
        (
            ["gradsift", "--pool", "web=s3://AKIA:s3/cre+t@bucket/x"],
            "gradsift --pool 'web=s3://***@bucket/x'",
        ),
        (
            ["gradsift", "--pool", SIGNED],
            "gradsift --pool 'https://host/pool.jsonl?X-Amz-Signature=***&v=***;k=***#part'",
        ),
        (
            ["gradsift", "--address", "ray://me:s3@cret@host:10001"],
            "gradsift --address 'ray://***@host:10001'",
        ),
        (["gradsift", "--address", "s3cret@host:6379"], "gradsift --address '***@host:6379'"),
        (["gradsift", "--address=me:s3cret@host:6379"], "gradsift '--address=***@host:6379'"),
        (
            ["gradsift", "--address", "host:6379", "--pool", "a@b"],
            "gradsift --address host:6379 --pool a@b",
        ),
        (
            ["gradsift", "--pool", "hdfs://host:8020/data@2/x", "--pool", "s3://b/x@y"],
            "gradsift --pool hdfs://host:8020/data@2/x --pool s3://b/x@y",
        ),
    ],
)
def test_commands_are_to_paste_and_hold_no_secret(argv: list[str] | str, shown: str) -> None:
    assert readable_command(argv) == shown
    assert "s3" not in shown.replace("s3://", "")
    assert readable_command(shown) == shown


def test_ctrl_c_prints_the_command_without_its_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "app", interrupt)
    monkeypatch.setattr(
        "sys.argv",
        [
            "/bin/gradsift",
            "select",
            "less",
            "--pool",
            SIGNED,
            "--address",
            "pw:s3cret@host:1",
            "--run",
            "a b",
        ],
    )
    with pytest.raises(SystemExit) as ended:
        app.main()
    said = capsys.readouterr().err
    assert ended.value.code == 130 and "s3cret" not in said
    assert said.endswith("--address '***@host:1' --run 'a b'\n")


@pytest.mark.parametrize(
    "url", ["memory://me:s3cret@bucket/none", "nonsense://me:s3cret@host/x?sig=s3cret"]
)
def test_errors_over_urls_hold_no_secret(url: str) -> None:
    with pytest.raises(UserError) as caught:
        fetched(url)
    assert str(caught.value).startswith(f"{url.partition(':')[0]}://***@") and "s3cret" not in str(
        caught.value
    )


def test_texts_that_hold_none_stay_as_they_are() -> None:
    for text in (
        "see https://host/a?b and c:d@e",
        "s3://bucket/x.jsonl: there is no such file",
        "mail me@host",
        "a?b=c",
    ):
        assert redacted(text) == text
