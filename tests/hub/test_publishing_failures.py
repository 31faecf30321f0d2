"""What a user is told when the Hub or the network fails, and what is on the Hub then; over HTTP."""

import socket

import huggingface_hub
import pytest
from hub_state import READ_ONLY_TOKEN, TOKEN
from huggingface_hub.utils._http import close_session

from hf_msn import MSNForPreTraining, PublishingError, publish_checkpoint

NAME = "alice/tiny"
UNSEEN = f"Nothing of this upload is visible in '{NAME}': it is as it was before."


def publish(run, repo_id=NAME, **settings):
    return publish_checkpoint(run, repo_id, **{"without_results": True, "what": "pretraining", **settings})


def refused(run, *parts, **settings) -> str:
    with pytest.raises(PublishingError) as error:
        publish(run, **settings)
    said = str(error.value)
    assert all(part in said for part in parts), said
    assert "\n" not in said and "hf_alice" not in said
    assert error.value.__context__ is None or error.value.__suppress_context__  # whose text has addresses
    return said


def test_no_token_is_said_with_the_way_to_one(hub, run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    refused(run, "There is no token", "`hf auth login`", "HF_TOKEN", "Nothing was sent")
    assert hub.requests == []
    publish(run, token=TOKEN)
    assert NAME in hub.repos


@pytest.mark.parametrize(
    ("token", "parts"),
    [
        ("hf_" + "unknown" * 5, ["does not accept the token (401", "`hf auth login`"]),
        (READ_ONLY_TOKEN, ["The token of 'alice' can only read", "write access"]),
    ],
)
def test_a_token_that_does_not_do_is_said_before_anything_is_made(hub, run, token, parts):
    refused(run, *parts, "Nothing was sent", token=token)
    assert hub.repos == {}


def test_a_namespace_of_others_is_said_with_its_name(hub, run):
    refused(run, "may not write to 'bob/tiny' (403", "write access to 'bob'", repo_id="bob/tiny")
    hub.add_repo("bob/public")
    refused(run, "may not write to 'bob/public' (403", repo_id="bob/public")
    hub.add_repo("bob/hidden", private=True)
    refused(run, "may not write to 'bob/hidden' (403", repo_id="bob/hidden")


def test_a_repo_with_another_model_is_refused_unless_it_is_to_be_replaced(hub, run, save_run, tmp_path):
    hub.add_repo(NAME, {"README.md": b"mine", "pytorch_model.bin": b"weights", ".eval_results/old.yaml": b"- 1"})
    refused(run, f"'{NAME}' (main) holds another model already: README.md, pytorch_model.bin", "`--update true`")
    assert hub.files(NAME)["README.md"] == b"mine" and not hub.asked("PUT", "/lfs/")
    publish(run, update=True)
    names = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json", "pytorch_model.bin"]
    assert sorted(hub.files(NAME)) == names  # the numbers of the other model are gone, what is not ours is left
    # The same model again is no clash: its card may be new. Other weights are, in the same configuration too.
    publish(run)
    other = save_run(tmp_path / "other")
    model = MSNForPreTraining.from_pretrained(other)
    model.prototypes.data += 1
    model.save_pretrained(other)
    refused(other, "holds another model already")


def test_a_repo_with_a_readme_alone_is_taken(hub, run):
    hub.add_repo(NAME, {"README.md": b"made on the website", "LICENSE": b"mine"})
    publish(run)
    assert hub.files(NAME)["LICENSE"] == b"mine" and hub.files(NAME)["README.md"] != b"made on the website"


@pytest.mark.parametrize("there", [True, False])
def test_who_sees_a_repo_is_never_changed(hub, run, there):
    hub.add_repo(NAME, private=there)
    word = "private" if there else "public"
    refused(run, f"`private` is {not there}, but '{NAME}' is there already and is {word}", private=not there)
    assert hub.repos[NAME].private is there and hub.files(NAME) == {}
    publish(run)
    assert hub.repos[NAME].private is there


@pytest.mark.parametrize(
    ("method", "part", "status", "words"),
    [
        ("GET", "whoami", 401, "does not accept the token (401: refused)"),
        ("POST", "repos/create", 403, "may not write to 'alice/tiny' (403: refused)"),
        ("POST", "repos/create", 409, "was changed by another at the same time (409: refused)"),
        ("POST", "preupload", 401, "does not accept the token (401: refused)"),
        ("POST", "objects/batch", 403, "may not write to 'alice/tiny' (403: refused)"),
        ("PUT", "/lfs/", 500, "The Hub failed (HTTP 500: refused), also when asked again"),
        ("PUT", "/lfs/", 429, "The Hub takes no more requests for now (429: refused)"),
        ("POST", "lfs/verify", 500, "The Hub failed (HTTP 500: refused)"),
        ("POST", "commit", 500, "The Hub failed (HTTP 500: refused)"),
        ("POST", "commit", 412, "was changed by another at the same time (412: refused)"),
        ("POST", "commit", 400, "The Hub refused (HTTP 400: refused)"),
        ("POST", "validate-yaml", 503, "The Hub failed (HTTP 503: refused)"),
    ],
)
def test_each_refusal_is_one_line_and_the_same_call_goes_on(hub, run, method, part, status, words):
    hub.fail(method, part, status)
    said = refused(run, words)
    assert said.endswith(UNSEEN if method != "GET" and "create" not in part else "Nothing was sent.")
    assert NAME not in hub.repos or hub.files(NAME) == {}  # made, maybe, but with nothing in it
    hub.failures.clear()
    publish(run)
    assert "model.safetensors" in hub.files(NAME)


def test_an_upload_that_failed_in_the_middle_goes_on_where_it_was(hub, save_run, tmp_path):
    run = save_run(tmp_path / "run", shards=True)
    shards = len(list(run.glob("model-*.safetensors")))
    assert shards >= 3
    hub.fail("PUT", "/lfs/", 500, skip=2)
    refused(run, "The Hub failed (HTTP 500", "run the same command again", UNSEEN)
    arrived = set(hub.repos[NAME].lfs)
    assert len(arrived) == 2 and hub.files(NAME) == {}
    hub.failures.clear()
    hub.requests.clear()
    publish(run)
    sent = {request.path.split("/")[-1] for request in hub.asked("PUT", "/lfs/")}
    assert len(sent) == shards - 2 and not sent & arrived
    assert hub.repos[NAME].messages == ["initial commit", "Publish with hf_msn"]
    for name in ("config.json", *(path.name for path in run.glob("model-*"))):
        assert hub.files(NAME)[name] == (run / name).read_bytes()


def test_a_connection_that_is_cut_in_the_middle_of_a_file_is_said(hub, run):
    hub.fail("PUT", "/lfs/", cut_after=1000)
    said = refused(run, f"The connection to {hub.url} was cut", "run the same command again", UNSEEN)
    assert "/lfs/" not in said and len(hub.asked("PUT", "/lfs/")) > 1
    assert hub.repos[NAME].lfs == {} and hub.files(NAME) == {}
    hub.failures.clear()
    publish(run)
    assert hub.files(NAME)["model.safetensors"] == (run / "model.safetensors").read_bytes()


def test_short_failures_are_waited_out(hub, run):
    hub.fail("PUT", "/lfs/", cut_after=1000, times=1)
    hub.fail("PUT", "/lfs/", 500, times=2)
    hub.fail("POST", "preupload", 429, times=2, headers={"Retry-After": "1"})
    publish(run)
    assert hub.files(NAME)["model.safetensors"] == (run / "model.safetensors").read_bytes()


def test_a_commit_whose_answer_was_lost_is_found_by_the_next_call(hub, run):
    publish(run)
    before = hub.repos[NAME].branches["main"]
    assert publish(run).url.endswith(before)  # nothing new, so no commit


def test_a_new_branch_whose_upload_failed_is_taken_by_the_same_call(hub, run):
    hub.add_repo(NAME, {"config.json": b"{}", "model.safetensors": b"of another"})
    hub.fail("POST", "commit", 500)
    refused(run, "The Hub failed (HTTP 500", revision="v2")
    assert hub.repos[NAME].branches["v2"] == hub.repos[NAME].branches["main"]
    hub.failures.clear()
    publish(run, revision="v2")
    assert hub.files(NAME, "v2")["config.json"] == (run / "config.json").read_bytes()
    assert hub.files(NAME)["config.json"] == b"{}"


def test_no_network_is_said(hub, run, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nowhere)
    refused(run, f"The connection to {nowhere} was cut, or there is none (ConnectError)", "Nothing was sent")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    close_session()
    refused(run, "HF_HUB_OFFLINE is set. Unset it to publish", "Nothing was sent")
    close_session()


def test_a_gitignore_of_the_repo_leaves_no_file_out(hub, run):
    hub.add_repo(NAME, {".gitignore": b"*.safetensors\nREADME.md"})
    publish(run)
    assert sorted(set(hub.files(NAME)) - {".gitignore"}) == [
        *("README.md", "config.json", "model.safetensors", "preprocessor_config.json")
    ]
