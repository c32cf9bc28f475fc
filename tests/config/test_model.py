"""The YAML of the operator's contract: what it means, what is refused and how, what is never shown."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml

from asyncproxy.config.load import dump_config, load_config
from asyncproxy.config.model import Config
from asyncproxy.core.endpoints import ENDPOINTS
from asyncproxy.core.errors import ConfigError

URL = "http://127.0.0.1:4000/v1"
SECRET = "sk-nobody-may-see-this"
MASK = "**********"

# The YAML of the operator's contract, as far as there are keys for it.
CONTRACT = """
listen: 127.0.0.1:8080
upstreams:
  - name: gateway
    base_url: http://127.0.0.1:4000/v1
    models: ["*"]
    concurrency: 64
    timeout: {connect: 5s, total: 10m}
    retry: {attempts: 3, backoff: 500ms, max_backoff: 30s}
auth:
  keys: []
client_timeout: 60s
jobs:
  result_ttl: 1h
  max_result_ttl: 24h
  deadline: 24h
  max_pending: 10000
  max_pending_per_credential: 10000
  max_request_bytes: 32MiB
  max_result_bytes: 64MiB
store:
  url: memory://
  max_bytes: 1GiB
shutdown_grace: 30s
log: {level: info, format: text}
"""


def load(environ: dict[str, str] | None = None, **sections: Any) -> Config:
    """A configuration of one upstream; ``upstream={…}`` adds to it."""
    one = {"base_url": URL, **sections.pop("upstream", {})}
    return load_config({"upstreams": [one], **sections}, environ=environ or {})


def problems(environ: dict[str, str] | None = None, **sections: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(environ, **sections)
    return caught.value.problems


def problem(environ: dict[str, str] | None = None, **sections: Any) -> str:
    (only,) = problems(environ, **sections)
    return only


def refused(text: str, tmp_path: Path) -> str:
    """What is wrong with a file of this text, in one line that names the file."""
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, environ={})
    (only,) = caught.value.problems
    return only.replace(str(path), "FILE")


# What it means


def test_the_defaults_are_those_of_the_contract(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(CONTRACT)
    config = load_config(path, environ={})
    assert config == load()
    assert config.upstreams[0].timeout.connect == 5
    assert config.upstreams[0].timeout.total == 600
    assert config.upstreams[0].retry.backoff == 0.5
    assert config.jobs.max_result_ttl == 86400
    assert config.jobs.max_result_bytes == 67108864
    assert config.jobs.endpoints == list(ENDPOINTS)
    assert config.upstreams[0].headers == {}
    assert config.upstreams[0].ca_file is None
    assert config.upstreams[0].insecure_skip_verify is False


def test_all_that_has_to_be_there_is_a_base_url() -> None:
    assert load_config({"upstreams": [{"base_url": URL}]}, environ={}).upstreams[0].base_url == URL
    with pytest.raises(ConfigError, match=r"^upstreams\[0\]\.base_url: missing"):
        load_config({"upstreams": [{}]}, environ={})


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("500ms", 0.5),
        ("5s", 5),
        ("10m", 600),
        ("1h", 3600),
        ("7d", 604800),
        ("1.5h", 5400),
        ("90", 90),
        (90, 90),
        (0.25, 0.25),
        (" 5 s ", 5),
    ],
)
def test_durations(written: object, seconds: float) -> None:
    assert load(client_timeout=written).client_timeout == seconds


@pytest.mark.parametrize(
    "written",
    ["5x", "5S", "s", "", "-5s", "1h30m", "1e3", "0", "0s", 0, -1, True, None, [5], math.inf, math.nan],
)
def test_what_is_no_duration(written: object) -> None:
    assert problem(client_timeout=written).startswith("client_timeout: found ")


@pytest.mark.parametrize("written", ["5x", True, None, [5]])
def test_durations_are_explained(written: object) -> None:
    assert "expected a duration like 500ms, 5s, 10m, 1h or 7d" in problem(client_timeout=written)


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("64KiB", 65536),
        ("32MiB", 33554432),
        ("1GiB", 1073741824),
        ("2TiB", 2199023255552),
        ("1.5KiB", 1536),
        ("100B", 100),
        ("100", 100),
        (100, 100),
        ("1 KiB", 1024),
    ],
)
def test_sizes(written: object, size: int) -> None:
    assert load(store={"max_bytes": written}).store.max_bytes == size


@pytest.mark.parametrize(
    "written", ["1MB", "1kib", "KiB", "", "-1", "0", 0, -1, 1.5, True, None, "0.5B"]
)
def test_what_is_no_size(written: object) -> None:
    assert problem(store={"max_bytes": written}).startswith("store.max_bytes: found ")


@pytest.mark.parametrize("written", ["1MB", 1.5, True])
def test_sizes_are_explained(written: object) -> None:
    found = problem(store={"max_bytes": written})
    assert "expected a size like 64KiB, 32MiB or 1GiB" in found


def test_a_size_beyond_all_numbers_is_refused_like_any_other() -> None:
    assert problem(store={"max_bytes": "9" * 400}).startswith("store.max_bytes: found ")


# The environment


@pytest.mark.parametrize(
    ("written", "model"),
    [
        ("${NAME}", "value"),
        ("a-${NAME}-b-${NAME}", "a-value-b-value"),
        ("${NAME:-default}", "value"),
        ("${OTHER:-default}", "default"),
        ("${EMPTY:-default}", "default"),
        ("x${OTHER:-}", "x"),
        ("${OTHER:-a:-b}", "a:-b"),
        ("$$", "$"),
        ("$${NAME}", "${NAME}"),
        ("$$${NAME}", "$value"),
        ("$NAME $", "$NAME $"),
        ("${TRICK}", "${NAME} $$"),
    ],
)
def test_values_of_the_environment(written: str, model: str) -> None:
    environ = {"NAME": "value", "EMPTY": "", "TRICK": "${NAME} $$"}
    assert load(environ, upstream={"models": [written]}).upstreams[0].models == [model]


def test_the_environment_is_that_of_the_process_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCPROXY_TEST_MODEL", "from-the-process")
    upstream = {"base_url": URL, "models": ["${ASYNCPROXY_TEST_MODEL}"]}
    assert load_config({"upstreams": [upstream]}).upstreams[0].models == ["from-the-process"]
    with pytest.raises(ConfigError):
        load_config({"upstreams": [upstream]}, environ={})


def test_a_variable_may_stand_for_a_number() -> None:
    environ = {"N": "7", "T": "90s"}
    config = load(environ, upstream={"concurrency": "${N}"}, client_timeout="${T}")
    assert (config.upstreams[0].concurrency, config.client_timeout) == (7, 90)


def test_an_unset_variable_is_named_with_its_path() -> None:
    found = problem(upstream={"headers": {"Authorization": "Bearer ${GATEWAY_API_KEY}"}})
    assert found.startswith("upstreams[0].headers.Authorization: ")
    assert "GATEWAY_API_KEY is not set" in found
    assert "${GATEWAY_API_KEY:-default}" in found


def test_each_unset_variable_is_named_once_and_not_blamed_for_its_type() -> None:
    found = problems(
        upstream={"concurrency": "${ONE}", "base_url": "${TWO}"},
        auth={"keys": ["${THREE}"]},
        log={"level": "loud"},
    )
    unset = {
        "upstreams[0].concurrency": "ONE",
        "upstreams[0].base_url": "TWO",
        "auth.keys[0]": "THREE",
    }
    assert sorted(line.partition(":")[0] for line in found) == sorted([*unset, "log.level"])
    for line in found:
        path = line.partition(":")[0]
        assert path == "log.level" or f"variable {unset[path]} is not set" in line


# What is refused


def test_everything_wrong_is_reported_at_once_each_with_its_path() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(
            {
                "listen": "nowhere",
                "upstreams": [
                    {"base_url": URL, "models": []},
                    {"name": "b", "base_url": "ftp://x", "timeout": {"total": "soon", "connect": 0}},
                    {"name": "no spaces", "retry": {"attempts": 0}, "concurrency": 5000},
                ],
                "jobs": {"endpoints": ["embeddings", "nothing"], "max_pending": "many"},
                "auth": {"keys": [""]},
                "store": {"url": "ftp://x"},
                "log": {"format": "xml"},
                "admin": 1,
            },
            environ={},
        )
    assert {line.partition(":")[0] for line in caught.value.problems} == {
        "listen",
        "upstreams[0].models",
        "upstreams[1].base_url",
        "upstreams[1].timeout.total",
        "upstreams[1].timeout.connect",
        "upstreams[2].name",
        "upstreams[2].base_url",
        "upstreams[2].retry.attempts",
        "upstreams[2].concurrency",
        "jobs.endpoints[1]",
        "jobs.max_pending",
        "auth.keys[0]",
        "store.url",
        "log.format",
        "admin",
    }
    assert str(caught.value) == "\n".join(caught.value.problems)


def test_a_problem_says_what_was_found_and_what_would_be_right() -> None:
    assert problem(log={"level": "loud"}) == (
        "log.level: found 'loud'; expected 'debug', 'info', 'warning' or 'error'"
    )
    assert problem(upstream={"concurrency": [1, 2]}).startswith(
        "upstreams[0].concurrency: found a list of 2; expected "
    )
    assert problem(client_timeout={}).startswith("client_timeout: found a mapping; expected ")
    assert problem(jobs=None).startswith("jobs: found nothing; expected ")


def test_what_was_found_is_cut_where_it_is_long() -> None:
    assert len(problem(log={"level": "x" * 5000})) < 300


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"lisen": ":80"}, "lisen: unknown key; did you mean `listen`?"),
        (
            {"upstream": {"timeout": {"totl": 1}}},
            "upstreams[0].timeout.totl: unknown key; did you mean `total`?",
        ),
        ({"upstream": {"baseurl": 1}}, "upstreams[0].baseurl: unknown key; did you mean `base_url`?"),
        ({"log": {"zzz": 1}}, "log.zzz: unknown key; known here are level, format"),
    ],
)
def test_an_unknown_key_comes_with_a_suggestion(sections: dict[str, Any], expected: str) -> None:
    assert problem(**sections) == expected


def test_a_default_ttl_above_the_largest_is_refused() -> None:
    assert "result_ttl (25h) of at most max_result_ttl (1d)" in problem(jobs={"result_ttl": "25h"})
    assert load(jobs={"result_ttl": "24h"}).jobs.result_ttl == 86400


def test_two_upstreams_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^upstreams: found a list of 2; .*`name` of their own"):
        load_config({"upstreams": [{"base_url": URL}, {"base_url": URL}]}, environ={})


@pytest.mark.parametrize(
    "headers",
    [
        {"a b": "x"},
        {"": "x"},
        {"a:": "x"},
        {"ü": "x"},
        {"A": "x\r\nB: y"},
        {"A": "x\0"},
        {"A": "x\x7f"},
    ],
)
def test_what_is_no_header_is_refused(headers: dict[str, str]) -> None:
    assert problem(upstream={"headers": headers}).startswith("upstreams[0].headers: ")


@pytest.mark.parametrize(
    "base_url",
    [
        "http://127.0.0.1:4000/v1",
        "http://gateway",
        "http://gateway/",
        "https://gateway.example/v1",
        "HTTPS://gateway.example:8443/openai/v1/",
        "http://[::1]:4000/v1",
        "http://gateway/ocr",
        "http://gateway/my-embeddings",
        "unix:/run/gateway.sock",
        "unix:/run/gateway.sock:/v1",
    ],
)
def test_base_urls(base_url: str) -> None:
    assert load(upstream={"base_url": base_url}).upstreams[0].base_url == base_url


@pytest.mark.parametrize(
    "base_url",
    [
        "",
        "gateway",
        "gateway:4000",
        "//gateway/v1",
        "ftp://gateway",
        "http://",
        "http:///v1",
        "http://gateway:port",
        "http://gateway:70000",
        "http://[::1/v1",
        "http://gate way/v1",
        "http://gateway/v1\n",
        "http://gatewäy/v1",
        "http://gateway/v1?key=1",
        "http://gateway/v1#here",
        "http://user@gateway/v1",
        "http://user:pass@gateway/v1",
        "unix:",
        "unix:gateway.sock",
        "unix://run/gateway.sock",
        "http://gateway:0/v1",
        "http://gateway/v1/embeddings",
        "http://gateway/v1/chat/completions/",
        "unix:/run/gateway.sock:/v1/embeddings",
        "unix:/run/gateway.sock\n",
        5,
        None,
    ],
)
def test_what_is_no_base_url(base_url: object) -> None:
    """``unix://run/x`` has ``run`` for its host: the socket would be ``/x``, which nobody has written."""
    assert problem(upstream={"base_url": base_url}).startswith("upstreams[0].base_url: found ")


@pytest.mark.parametrize(
    ("listen", "address"),
    [
        ("127.0.0.1:8080", ("127.0.0.1", 8080)),
        ("localhost:0", ("localhost", 0)),
        (":8080", (None, 8080)),
        ("[::1]:8080", ("::1", 8080)),
        ("[::]:65535", ("::", 65535)),
    ],
)
def test_addresses_to_listen_on(listen: str, address: tuple[str | None, int]) -> None:
    assert load(listen=listen).address == address


@pytest.mark.parametrize(
    "listen",
    ["", "8080", "localhost", "localhost:", "::1:80", "a:65536", "a:-1", "a:x", "a:²", 8080, None],
)
def test_what_is_no_address(listen: object) -> None:
    assert problem(listen=listen).startswith("listen: found ")


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"listen": 8080}, "listen: found 8080; expected host:port, like 127.0.0.1:8080 or [::1]:8080"),
        ({"listen": None}, "listen: found nothing; expected host:port, like "),
        ({"admin_listen": 9090}, "admin_listen: found 9090; expected host:port, like "),
        ({"upstream": {"base_url": 4000}}, "upstreams[0].base_url: found 4000; expected a URL like "),
        (
            {"upstream": {"base_url": "http://gateway/v1/embeddings"}},
            "upstreams[0].base_url: found 'http://gateway/v1/embeddings'; expected a URL without /embeddings",
        ),
        ({"store": {"url": 5}}, "store.url: found 5; expected memory://, sqlite:///path/jobs.db or "),
        (
            {"store": {"url": "redis://host:0/0", "encryption_key": "A" * 43 + "="}},
            "store.url: found 'redis://host:0/0'; expected memory://, ",
        ),
        (
            {"jobs": {"endpoints": ["ocr", "embedings"]}},
            "jobs.endpoints[1]: found 'embedings'; expected `embeddings`, perhaps; known are embeddings, ",
        ),
        (
            {"jobs": {"endpoints": ["xyz"]}},
            "jobs.endpoints[0]: found 'xyz'; expected one of embeddings, ",
        ),
        ({"jobs": {"endpoints": [5]}}, "jobs.endpoints[0]: found 5; expected text"),
        ({"jobs": {"endpoints": ["ocr", "ocr"]}}, "jobs.endpoints: found a list of 2; expected each "),
    ],
    ids=str,
)
def test_a_slip_that_is_easily_made_is_named(sections: dict[str, Any], expected: str) -> None:
    assert problem(**sections).startswith(expected)


def test_a_file_of_authorities_has_to_be_there(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    assert problem(upstream={"ca_file": str(file)}).endswith(
        "expected the path of a PEM file with certificates"
    )
    file.write_text("no certificate")
    assert "PEM" in problem(upstream={"ca_file": str(file)})
    trustme.CA().cert_pem.write_to_path(file)
    assert load(upstream={"ca_file": str(file)}).upstreams[0].ca_file == str(file)


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().listen = ":80"


# Files


def test_a_key_that_is_there_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    text = f"upstreams:\n- base_url: {URL}\n  concurrency: 1\n  concurrency: 2\n"
    assert refused(text, tmp_path) == "FILE, line 4, column 3: `concurrency` is here twice"
    assert refused("listen: :1\nupstreams: []\nlisten: :2\n", tmp_path).startswith("FILE, line 3")


def test_what_is_not_yaml_is_refused_with_its_line(tmp_path: Path) -> None:
    assert refused("listen: :80\nupstreams: [\n", tmp_path).startswith("FILE, line 3, column 1: ")
    assert refused("a: b\n\tc: d\n", tmp_path).startswith("FILE, line 2, column 1: ")
    assert refused("a: !!python/object:os.system b\n", tmp_path).startswith("FILE, line 1, column 4: ")
    assert refused("a: \0\n", tmp_path).startswith("FILE: ")


@pytest.mark.parametrize("value", ["2024-13-45", "0x_", "0b_"])
def test_a_value_that_yaml_cannot_read_is_refused_like_any_other(value: str, tmp_path: Path) -> None:
    assert refused(f"upstreams:\n- base_url: {URL}\n  name: {value}\n", tmp_path)


def test_a_file_that_is_missing_is_refused_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.yaml"
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert caught.value.problems == (f"{path}: cannot be read: No such file or directory",)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(str(tmp_path))


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"listen: \xff\n")
    with pytest.raises(ConfigError, match="cannot be read: not UTF-8"):
        load_config(path)


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_an_empty_file_is_refused(text: str, tmp_path: Path) -> None:
    found = refused(text, tmp_path)
    assert "found nothing" in found
    assert "a mapping with `upstreams`" in found


@pytest.mark.parametrize("text", ["- a\n", "text\n", "5\n"])
def test_a_file_that_is_no_mapping_is_refused(text: str, tmp_path: Path) -> None:
    assert "expected a mapping with `upstreams`" in refused(text, tmp_path)


def test_a_mapping_without_upstreams_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({}, environ={})
    assert caught.value.problems == ("upstreams: missing; it has no default",)
    with pytest.raises(ConfigError, match=r"^upstreams: found an empty list; "):
        load_config({"upstreams": []}, environ={})


# Secrets


def secretive() -> Config:
    headers = {"Authorization": f"Bearer {SECRET}", "X-Plain": SECRET}
    return load({"KEY": SECRET}, upstream={"headers": headers}, auth={"keys": ["${KEY}"]})


def test_secrets_are_masked_wherever_a_configuration_is_shown() -> None:
    config = secretive()
    assert config.auth.keys[0].get_secret_value() == SECRET
    shown = (
        dump_config(config),
        repr(config),
        str(config),
        f"{config} {config.auth} {config.upstreams[0]!r}",
        config.model_dump_json(),
        repr(config.model_dump()),
    )
    for text in shown:
        assert SECRET not in text
        assert MASK in text


@pytest.mark.parametrize(
    "sections",
    [
        {"auth": {"keys": SECRET}},
        {"auth": {"keys": {SECRET: SECRET}}},
        {"auth": {"keys": [[SECRET]]}},
        {"auth": {"keys": [{"key": SECRET}]}},
        {"auth": {"key": SECRET}},
        {"auth": SECRET},
        {"auth": [SECRET]},
        {"upstream": {"headers": SECRET}},
        {"upstream": {"headers": [SECRET]}},
        {"upstream": {"headers": {"Authorization": [SECRET]}}},
        {"upstream": {"headers": {"Authorization": {"Bearer": SECRET}}}},
        {"upstream": {"headers": {"Authorization": f"Bearer {SECRET}\n"}}},
        {"upstream": {"header": {"Authorization": SECRET}}},
        {"upstream": {"base_url": f"http://user:{SECRET}@gateway/v1"}},
        {"upstream": {"base_url": f"http://gateway/v1?key={SECRET}"}},
        {"store": {"url": f"redis://:{SECRET}@localhost:6379/0"}},
    ],
    ids=str,
)
def test_no_error_shows_a_secret(sections: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(**sections)
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(caught.value)
    assert caught.value.__suppress_context__, "what pydantic said holds the values"


def test_a_secret_that_is_a_number_is_not_shown_either() -> None:
    assert "4815162342" not in problem(auth={"keys": [4815162342]})
    assert "4815162342" not in problem(upstream={"headers": {"Authorization": 4815162342}})


def test_no_error_of_yaml_shows_a_secret(tmp_path: Path) -> None:
    assert SECRET not in refused(f"auth:\n  keys: [{SECRET}\nlisten: :80\n", tmp_path)
    assert SECRET not in refused(f'auth:\n  keys: ["{SECRET}]\n', tmp_path)
    assert SECRET not in refused(f"a: {SECRET}: {SECRET}\n", tmp_path)


@pytest.mark.parametrize("admin", ["127.0.0.1:8080", "nowhere", "[::1", ":70000"])
def test_an_address_for_the_pages_that_cannot_be(admin: str) -> None:
    (problem,) = problems(listen="127.0.0.1:8080", admin_listen=admin)
    assert "admin_listen" in problem


def test_the_pages_have_no_address_of_their_own_unless_told() -> None:
    assert load().admin_address is None
    assert load(admin_listen=":9090").admin_address == (None, 9090)
    assert load(listen=":0", admin_listen=":0").admin_address == (None, 0)


# What is shown


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"listen": "[::1]:0", "log": {"level": "debug", "format": "json"}, "shutdown_grace": "250ms"},
        {"jobs": {"endpoints": ["ocr"], "result_ttl": "90s", "deadline": "7d", "max_pending": 1}},
        {"store": {"max_bytes": 1000}, "client_timeout": 1.5},
        {"upstream": {"models": ["gpt-*", "ü"], "concurrency": 1, "insecure_skip_verify": True}},
        {"upstream": {"retry": {"attempts": 1, "backoff": "1ms", "max_backoff": "1.5h"}}},
        {"client_timeout": 1234567},
        {"client_timeout": 1.2345678},
        {"store": {"max_bytes": 1234567890123}},
        {"upstream": {"models": ["$${NAME}"]}},
        {"upstream": {"models": ["$$$$"]}},
    ],
    ids=str,
)
def test_what_is_shown_loads_again_and_means_the_same(sections: dict[str, Any]) -> None:
    config = load(**sections)
    assert load_config(yaml.safe_load(dump_config(config)), environ={}) == config


def test_what_is_shown_of_secrets_loads_again_as_their_mask() -> None:
    config = secretive()
    again = load_config(yaml.safe_load(dump_config(config)), environ={})
    assert again.upstreams[0].headers.keys() == config.upstreams[0].headers.keys()
    assert [key.get_secret_value() for key in again.auth.keys] == [MASK]
    assert again.model_dump(mode="json") == config.model_dump(mode="json")


def test_what_is_shown_is_written_as_people_write_it() -> None:
    shown = yaml.safe_load(dump_config(load(client_timeout=0.5, jobs={"result_ttl": 5400})))
    assert shown["client_timeout"] == "500ms"
    assert shown["jobs"]["result_ttl"] == "90m"
    assert shown["jobs"]["max_result_ttl"] == "1d"
    assert shown["store"]["max_bytes"] == "1GiB"
    assert list(shown) == list(Config.model_fields)
